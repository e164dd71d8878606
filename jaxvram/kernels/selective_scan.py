"""Mamba's selective scan (Gu & Dao 2023, arXiv:2312.00752, section 3): a linear recurrence whose coefficients are data.

    delta_t = softplus(dt_t + dt_bias)                      step size of each channel
    h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t          N states a channel
    y_t = (sum_n C_t h_t + D x_t) silu(z_t)

B_t and C_t, of N numbers, are shared by all channels. Saved for backward: the inputs, and in fp32 the state before every
CHUNK = 64 steps: 4 N / 64 bytes a token and channel, 1 byte at N = 16. Nothing is kept of single steps: both paths walk
through a chunk once more from its state. Temporaries of the backward pass, at N = 16 and a token and channel: kernels need
8 N / E_p bytes for partial sums (E_p = 32 channels a program, more where that would exceed selective_scan_pallas.
PARTIALS_BUDGET and up to 128: 4 bytes to 1) and, whatever T, B E N CHUNK bytes of scratch; XLA needs a few (CHUNK, B, N, E)
in fp32, whatever T.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend
from jaxvram.kernels import selective_scan_pallas as kernels
from jaxvram.kernels import selective_scan_xla as xla
from jaxvram.kernels.selective_scan_xla import Inputs

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def selective_scan_reference(
    x_BxTxE, dt_BxTxE, A_ExN, B_BxTxN, C_BxTxN, D_E=None, z_BxTxE=None, *, dt_bias_E=None, h_BxExN=None, resets_BxT=None
):
    """The definition, step by step; arguments and results as `selective_scan` has them. Differentiated by JAX."""
    wide = lambda array: array.astype(jnp.promote_types(array.dtype, jnp.float32))
    x, dt, A, B, C = map(wide, (x_BxTxE, dt_BxTxE, A_ExN, B_BxTxN, C_BxTxN))
    delta_BxTxE = jax.nn.softplus(dt if dt_bias_E is None else dt + dt_bias_E)
    if h_BxExN is None:
        h_BxExN = jnp.zeros((x.shape[0], *A.shape), x.dtype)
    if resets_BxT is None:
        resets_BxT = jnp.zeros(x.shape[:2], bool)

    def step(h_BxExN, of_step):
        x_BxE, delta_BxE, B_BxN, C_BxN, reset_B = of_step
        h_BxExN = jnp.where(reset_B[:, None, None], 0, h_BxExN)
        h_BxExN = jnp.exp(delta_BxE[..., None] * A) * h_BxExN + (delta_BxE * x_BxE)[..., None] * B_BxN[:, None]
        return h_BxExN, (h_BxExN * C_BxN[:, None]).sum(-1)

    by_time = [a.swapaxes(0, 1) for a in (x, delta_BxTxE, B, C, resets_BxT)]
    h_BxExN, y_TxBxE = jax.lax.scan(step, h_BxExN, tuple(by_time))
    y_BxTxE = y_TxBxE.swapaxes(0, 1)
    if D_E is not None:
        y_BxTxE = y_BxTxE + D_E * x
    if z_BxTxE is not None:
        y_BxTxE = y_BxTxE * jax.nn.silu(wide(z_BxTxE))
    return y_BxTxE.astype(x_BxTxE.dtype), h_BxExN


def selective_scan(
    x_BxTxE, dt_BxTxE, A_ExN, B_BxTxN, C_BxTxN, D_E=None, z_BxTxE=None, *, dt_bias_E=None, h_BxExN=None, resets_BxT=None,
    implementation="auto",
):  # fmt: skip
    """Outputs of every step, and the state after the last.

    Args:
      x_BxTxE: the channels' inputs, E of them ("d_inner"), in the compute dtype; all is computed in fp32.
      dt_BxTxE: step sizes before bias and softplus.
      A_ExN: negative, fp32; Mamba has -exp(A_log).
      B_BxTxN, C_BxTxN: how a token enters the N states, and how it reads them.
      D_E: share of x in y; None: 0.
      z_BxTxE: gate, y becomes y silu(z); None: no gate.
      dt_bias_E: added to dt; None: 0.
      h_BxExN: state before the first step, fp32; None: zeros.
      resets_BxT: bool; where true a document starts, and the state before it counts as zero. Not differentiated.
      implementation: 'auto': kernels where the program is lowered for CUDA, else XLA; 'pallas', 'xla' or 'interpret'.
    Returns:
      (y_BxTxE in the dtype of x, h_BxExN in fp32). Both may be differentiated, by all but the resets. A sequence cut
      anywhere, with the state passed on, gives the same.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    (B, T, E), N = x_BxTxE.shape, A_ExN.shape[-1]
    wanted = {
        "dt": (dt_BxTxE, (B, T, E)), "A": (A_ExN, (E, N)), "B": (B_BxTxN, (B, T, N)), "C": (C_BxTxN, (B, T, N)),
        "D": (D_E, (E,)), "z": (z_BxTxE, (B, T, E)), "dt_bias": (dt_bias_E, (E,)), "h": (h_BxExN, (B, E, N)),
        "resets": (resets_BxT, (B, T)),
    }  # fmt: skip
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            given = f"x {x_BxTxE.shape}, A {A_ExN.shape}"
            raise ValueError(f"selective_scan: {name} {array.shape} for {given}; {shape} belongs to them")
    choice = backend.choose("selective_scan", implementation, _obstacle(x_BxTxE, dt_BxTxE, B_BxTxN, C_BxTxN, z_BxTxE, N))
    f32 = lambda array, *shape: jnp.zeros(shape, jnp.float32) if array is None else array.astype(jnp.float32)
    inputs = Inputs(
        x_BxTxE, dt_BxTxE, f32(A_ExN), B_BxTxN, C_BxTxN, f32(D_E, E), f32(dt_bias_E, E), f32(h_BxExN, B, E, N), z_BxTxE,
        resets_BxT,
    )  # fmt: skip
    return _scan(choice, inputs)


def _obstacle(x, dt, B, C, z, N) -> str | None:
    for name, array in {"x": x, "dt": dt, "B": B, "C": C, "z": z}.items():
        if array is not None and array.dtype not in KERNEL_DTYPES:
            return f"{name}: dtype {array.dtype} is not one of bfloat16, float16, float32"
    if N > kernels.MOST_STATES:
        return f"A: {N} states a channel are more than the {kernels.MOST_STATES} that a program holds"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(implementation: str, inputs: Inputs):
    return _forward(implementation, inputs)[0]


def _forward(implementation, inputs):
    y_BxTxE, h_BxExN, states_BxcxNxE = backend.dispatch(implementation, kernels.forward, xla.forward, inputs)
    return (y_BxTxE, h_BxExN), (inputs._replace(h_BxExN=None), states_BxcxNxE)


def _backward(implementation, residuals, cotangents):
    inputs, states_BxcxNxE = residuals  # the first of these states is the one that was given
    gradients = backend.dispatch(implementation, kernels.backward, xla.backward, inputs, states_BxcxNxE, *cotangents)
    if inputs.resets_BxT is None:
        return (gradients,)
    return (gradients._replace(resets_BxT=np.zeros(inputs.resets_BxT.shape, jax.dtypes.float0)),)


_scan.defvjp(_forward, _backward)
