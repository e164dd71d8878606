"""A short causal convolution of each channel along time, and silu: what Mamba and its kin do before their recurrence.

  c_t = bias + sum_{w < W} kernel_w x_{t - W + 1 + w};  y_t = silu(c_t)          (W = 4)

Bytes: W shifted multiply-adds are one fusion for XLA, on any platform: x is read and y written once. Left to itself, JAX
would keep c in fp32 for the backward pass; here that keeps x alone, sizeof(x) a token and channel, and makes c again. There
is no Pallas form: it could read no byte less.
"""

import jax
import jax.numpy as jnp


def causal_conv_reference(x_BxTxE, kernel_WxE, bias_E, tail_BxVxE=None, resets_BxT=None):
    """The definition, a token at a time; arguments and results as `causal_conv` has them."""
    (B, T, E), W = x_BxTxE.shape, kernel_WxE.shape[0]
    tail = jnp.zeros((B, W - 1, E)) if tail_BxVxE is None else tail_BxVxE.astype(jnp.float32)
    resets_BxT = jnp.zeros((B, T), bool) if resets_BxT is None else resets_BxT

    def step(tail_BxVxE, at):
        x_BxE, reset_B = at
        tail_BxVxE = jnp.where(reset_B[:, None, None], 0, tail_BxVxE)
        window_BxWxE = jnp.concatenate([tail_BxVxE, x_BxE.astype(jnp.float32)[:, None]], axis=1)
        return window_BxWxE[:, 1:], jax.nn.silu((window_BxWxE * kernel_WxE).sum(1) + bias_E)

    tail, y_TxBxE = jax.lax.scan(step, tail, (x_BxTxE.swapaxes(0, 1), resets_BxT.T))
    return y_TxBxE.swapaxes(0, 1).astype(x_BxTxE.dtype), tail.astype(x_BxTxE.dtype)


def causal_conv(x_BxTxE, kernel_WxE, bias_E, tail_BxVxE=None, resets_BxT=None):
    """silu of the convolution, sums in fp32.

    Args:
      x_BxTxE: inputs.
      kernel_WxE, bias_E: of each channel; kernel_W-1 meets the token itself.
      tail_BxVxE: the V = W - 1 inputs before x, as an earlier call returned them; None: zeros.
      resets_BxT: bool; nothing before such a token is seen from it on (a document begins there). None: nowhere.
    Returns:
      (y_BxTxE in the dtype of x, the last W - 1 inputs of the document at hand, zeros where it has fewer)
    """
    B, _, E = x_BxTxE.shape
    if tail_BxVxE is None:
        tail_BxVxE = jnp.zeros((B, kernel_WxE.shape[0] - 1, E), x_BxTxE.dtype)
    seen_BxVT = None
    if resets_BxT is not None:  # the number of the document that each input belongs to, from 0, the tail's
        seen_BxVT = jnp.pad(jnp.cumsum(resets_BxT, axis=1), ((0, 0), (tail_BxVxE.shape[1], 0)))
    inputs_BxVTxE = jnp.concatenate([tail_BxVxE.astype(x_BxTxE.dtype), x_BxTxE], axis=1)
    y_BxTxE = _conv(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT)
    T = x_BxTxE.shape[1]
    tail = inputs_BxVTxE[:, T:]
    if seen_BxVT is not None:
        tail = jnp.where((seen_BxVT[:, T:] == seen_BxVT[:, -1:])[..., None], tail, 0)
    return y_BxTxE, tail


def _windows(inputs_BxVTxE, seen_BxVT, W: int):
    """For each w the input that kernel_w meets at each token, fp32; 0 where it is of another document."""
    T = inputs_BxVTxE.shape[1] - W + 1
    for w in range(W):
        x_BxTxE = inputs_BxVTxE[:, w : w + T].astype(jnp.float32)
        if seen_BxVT is not None and w < W - 1:
            x_BxTxE = jnp.where((seen_BxVT[:, w : w + T] == seen_BxVT[:, W - 1 :])[..., None], x_BxTxE, 0)
        yield x_BxTxE


def _before_silu(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT):
    windows = _windows(inputs_BxVTxE, seen_BxVT, kernel_WxE.shape[0])
    return sum(x_BxTxE * k_E for x_BxTxE, k_E in zip(windows, kernel_WxE.astype(jnp.float32), strict=True)) + bias_E


@jax.custom_vjp
def _conv(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT):
    return jax.nn.silu(_before_silu(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT)).astype(inputs_BxVTxE.dtype)


def _forward(*arrays):
    return _conv(*arrays), arrays


def _backward(residuals, dy_BxTxE):
    inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT = residuals
    W, T = kernel_WxE.shape[0], dy_BxTxE.shape[1]
    c_BxTxE = _before_silu(*residuals)
    s_BxTxE = jax.nn.sigmoid(c_BxTxE)
    dc_BxTxE = dy_BxTxE.astype(jnp.float32) * s_BxTxE * (1 + c_BxTxE * (1 - s_BxTxE))
    dkernel_WxE = jnp.stack([(x_BxTxE * dc_BxTxE).sum((0, 1)) for x_BxTxE in _windows(inputs_BxVTxE, seen_BxVT, W)])
    dinputs = 0
    for w in range(W):  # inputs at w + t are met by kernel_w at token t
        part_BxTxE = dc_BxTxE * kernel_WxE[w].astype(jnp.float32)
        if seen_BxVT is not None and w < W - 1:
            part_BxTxE = jnp.where((seen_BxVT[:, w : w + T] == seen_BxVT[:, W - 1 :])[..., None], part_BxTxE, 0)
        dinputs += jnp.pad(part_BxTxE, ((0, 0), (w, W - 1 - w), (0, 0)))
    dbias_E = dc_BxTxE.sum((0, 1)).astype(bias_E.dtype)
    return dinputs.astype(inputs_BxVTxE.dtype), dkernel_WxE.astype(kernel_WxE.dtype), dbias_E, None


_conv.defvjp(_forward, _backward)
