"""A short causal convolution of each channel along time, and silu: what Mamba and its kin do before their recurrence.

  c_t = bias + sum_{w < W} kernel_w x_{t - W + 1 + w};  y_t = silu(c_t)          (W = 4)

Kept for the backward pass is x alone, sizeof(x) bytes a token and channel; c is made again. Forward, x is read and y
written once. Backward, x and dy are read, the gradient of c is written in the dtype of x and read again for that of x. With
documents, XLA alone would write down c's gradient and each window in fp32 as well, 16 bytes more: hence the kernel.
"""

import functools

import jax
import jax.numpy as jnp

from jaxvram.kernels import backend, causal_conv_pallas

FEW = 16  # tokens up to which 'auto' is XLA: a kernel's tile would be all padding


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


def causal_conv(x_BxTxE, kernel_WxE, bias_E, tail_BxVxE=None, resets_BxT=None, *, implementation="auto"):
    """silu of the convolution, sums in fp32.

    Args:
      x_BxTxE: inputs.
      kernel_WxE, bias_E: of each channel; kernel_W-1 meets the token itself.
      tail_BxVxE: the V = W - 1 inputs before x, as an earlier call returned them; None: zeros.
      resets_BxT: bool; nothing before such a token is seen from it on (a document begins there). None: nowhere.
      implementation: 'auto': a Pallas kernel where lowered for CUDA, else XLA; 'pallas', 'xla' or 'interpret': that one.
    Returns:
      (y_BxTxE in the dtype of x, the last W - 1 inputs of the document at hand, zeros where it has fewer)
    """
    B, T, E = x_BxTxE.shape
    V = kernel_WxE.shape[0] - 1
    if kernel_WxE.shape[1:] != (E,) or bias_E.shape != (E,):
        shapes = f"x {x_BxTxE.shape}, kernel {kernel_WxE.shape} and bias {bias_E.shape}"
        raise ValueError(f"causal_conv: {shapes} do not belong together")
    choice = backend.choose("causal_conv", implementation, None)
    if choice == "auto" and T <= FEW:
        choice = "xla"
    tail_BxVxE = jnp.zeros((B, V, E), x_BxTxE.dtype) if tail_BxVxE is None else tail_BxVxE.astype(x_BxTxE.dtype)
    seen_BxVT = None
    if resets_BxT is not None:  # the number of the document that each input belongs to, from 0, the tail's
        seen_BxVT = jnp.pad(jnp.cumsum(resets_BxT, axis=1, dtype=jnp.int32), ((0, 0), (V, 0)))
    y_BxTxE = _conv(choice, x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT)
    tail = jnp.concatenate([tail_BxVxE, x_BxTxE[:, -V:]], axis=1)[:, -V:] if T < V else x_BxTxE[:, T - V :]
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


def _xla_forward(x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT):
    inputs_BxVTxE = jnp.concatenate([tail_BxVxE, x_BxTxE], axis=1)
    return jax.nn.silu(_before_silu(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT)).astype(x_BxTxE.dtype)


def _xla_backward(x_BxTxE, tail_BxVxE, kernel_WxE, bias_E, seen_BxVT, dy_BxTxE):
    """(gradient of c in the dtype of x, dkernel, dbias)."""
    inputs_BxVTxE = jnp.concatenate([tail_BxVxE, x_BxTxE], axis=1)
    W = kernel_WxE.shape[0]
    c_BxTxE = _before_silu(inputs_BxVTxE, kernel_WxE, bias_E, seen_BxVT)
    s_BxTxE = jax.nn.sigmoid(c_BxTxE)
    dc_BxTxE = dy_BxTxE.astype(jnp.float32) * s_BxTxE * (1 + c_BxTxE * (1 - s_BxTxE))
    dkernel_WxE = jnp.stack([(x_BxTxE * dc_BxTxE).sum((0, 1)) for x_BxTxE in _windows(inputs_BxVTxE, seen_BxVT, W)])
    dbias_E = dc_BxTxE.sum((0, 1)).astype(bias_E.dtype)
    return dc_BxTxE.astype(x_BxTxE.dtype), dkernel_WxE.astype(kernel_WxE.dtype), dbias_E


def _input_gradient(dc_BxTxE, kernel_WxE, seen_BxVT):
    """Of tail and x, (B, V + T, E) in fp32: input w + t is met by kernel_w at token t."""
    W, T = kernel_WxE.shape[0], dc_BxTxE.shape[1]
    dinputs = 0
    for w in range(W):
        part_BxTxE = dc_BxTxE.astype(jnp.float32) * kernel_WxE[w]
        if seen_BxVT is not None and w < W - 1:
            part_BxTxE = jnp.where((seen_BxVT[:, w : w + T] == seen_BxVT[:, W - 1 :])[..., None], part_BxTxE, 0)
        dinputs += jnp.pad(part_BxTxE, ((0, 0), (w, W - 1 - w), (0, 0)))
    return dinputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(implementation, x, tail, kernel, bias, seen):
    return backend.dispatch(implementation, causal_conv_pallas.forward, _xla_forward, x, tail, kernel, bias, seen)


def _forward(implementation, *arrays):
    return _conv(implementation, *arrays), arrays


def _backward(implementation, arrays, dy_BxTxE):
    x_BxTxE, tail_BxVxE, kernel_WxE, _, seen_BxVT = arrays
    dc_BxTxE, dkernel_WxE, dbias_E = backend.dispatch(
        implementation, causal_conv_pallas.backward, _xla_backward, *arrays, dy_BxTxE
    )
    V = tail_BxVxE.shape[1]
    dx_BxTxE = _input_gradient(dc_BxTxE, kernel_WxE, seen_BxVT)[:, V:].astype(x_BxTxE.dtype)
    seen = None if seen_BxVT is None else seen_BxVT[:, : V + min(V, dy_BxTxE.shape[1])]
    dtail_BxVxE = _input_gradient(dc_BxTxE[:, :V], kernel_WxE, seen)[:, :V].astype(x_BxTxE.dtype)  # met by V tokens only
    return dx_BxTxE, dtail_BxVxE, dkernel_WxE, dbias_E, None


_conv.defvjp(_forward, _backward)
