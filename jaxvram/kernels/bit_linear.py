"""BitNet b1.58's product of int8 activations and ternary weights, trained and packed (arXiv:2402.17764, arXiv:2504.12285).

    i_t = 127 / max(max_d |x_td|, 1e-5);   q_td = clip(round(x_td i_t), -128, 127)                 a scale a token
    c = clip(round(W / s), -1, 1),  s = max(mean |W|, 1e-5)                                        a scale a matrix
    y_t = (q_t . c) s / i_t                            q . c is an integer, summed in int32: exact, in whatever order
    dx = s g c,   dW = g^T (q / i)                     straight through: as if nobody had rounded

W is (out, in), other than the rest of the house: integer tensor cores want both sides contiguous along what is added up, and
XLA would turn W round in fp32, all layers at once, before their loop.

`bit_linear` is for training, W in full precision, where a fake-quantised product keeps x (2 bytes in bf16) and a rounded W
(2 more) for the backward pass: here it keeps q, 1 byte a number, 4 a token, and of W nothing: the codes are made again from
the parameter, which is there anyway (packed codes, a quarter of a byte, would be more). Its product is of int8 on CUDA,
XLA's own (on sm_89 by mma.sync.m16n8k32.s32.s8.s8.s32); elsewhere it is an fp32 product of the same integers, exact as long
as 128 D < 2^24, which a CPU is faster at.

`packed_linear` is for weights that are ternary for good, in 2 or 1.6 bits (kernels/ternary.py), with a gradient by x alone.
Bytes that a product of N rows moves, a weight: XLA's path reads the packed codes, writes them as int8 and reads those again:
2.25 (base3: 2.2). The kernel unpacks on chip: 0.25 (0.2) for every block of rows. 'auto' is the kernel where one block holds
all rows, as in decoding; others would unpack again and again. A bf16 matrix has 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxvram.kernels import backend, bit_linear_pallas, ternary

LEAST_MAXIMUM = 1e-5  # of a token
ALONG_D = (((1,), (1,)), ((), ()))
EXACT = 2**24  # up to which fp32 has every integer


def quantize_rows(x_NxD):
    """(int8 codes, fp32 (N, 1) what a code is worth)."""
    x_NxD = x_NxD.astype(jnp.float32)
    scale_Nx1 = 127 / jnp.maximum(jnp.abs(x_NxD).max(-1, keepdims=True), LEAST_MAXIMUM)
    return jnp.clip(jnp.round(x_NxD * scale_Nx1), -128, 127).astype(jnp.int8), 1 / scale_Nx1


def bit_linear_reference(x_xD, w_FxD, mix=1.0):
    """The definition, in fp32: x and W less what rounding takes off, which has no gradient."""
    x_xD, w_FxD = x_xD.astype(jnp.float32), w_FxD.astype(jnp.float32)
    return jnp.einsum("...d,fd->...f", *mixed(x_xD, w_FxD, mix), precision=lax.Precision.HIGHEST)


def mixed(x_xD, w_FxD, mix):
    """(x, W), rounded by `mix` of the way, 0 to 1; their gradients go straight through. In the dtypes that they come in."""
    codes_xD, worth = quantize_rows(x_xD)
    codes_FxD, scale = ternary.codes_of(w_FxD)
    blend = lambda a, rounded: (a + mix * lax.stop_gradient(rounded - a.astype(jnp.float32))).astype(a.dtype)
    return blend(x_xD, codes_xD * worth), blend(w_FxD, codes_FxD * scale)


def bit_linear(x_xD, w_FxD):
    """y = Q(x) Q(W)^T, both rounded as above, gradients straight through.

    Args:
      x_xD: bf16 or fp32, any leading axes.
      w_FxD: W as it is trained, fp32 or bf16: the codes are those of what it holds.
    Returns:
      y_xF in the dtype of x. The backward pass keeps D + 4 bytes a token, and W itself.
    """
    F, D = w_FxD.shape
    if x_xD.shape[-1] != D:
        raise ValueError(f"bit_linear: x {x_xD.shape} does not end in D={D}, W has {w_FxD.shape}")
    return _bit_linear(x_xD.reshape(-1, D), w_FxD).reshape(*x_xD.shape[:-1], F)


@jax.custom_vjp
def _bit_linear(x_NxD, w_FxD):
    codes_NxD, worth_Nx1 = quantize_rows(x_NxD)
    codes_FxD, scale = ternary.codes_of(w_FxD)
    return _scaled(integer_product(codes_NxD, codes_FxD), worth_Nx1, scale, x_NxD.dtype)


def _scaled(product_NxF, worth_Nx1, scale, dtype):
    return (product_NxF.astype(jnp.float32) * (worth_Nx1 * scale)).astype(dtype)


def integer_product(a_NxD, b_FxD):
    """a b^T of int8 numbers, exactly: int32, or the same integers in fp32."""
    if 128 * a_NxD.shape[1] >= EXACT:
        return _in_integers(a_NxD, b_FxD)
    return lax.platform_dependent(a_NxD, b_FxD, cuda=lambda a, b: _in_integers(a, b).astype(jnp.float32), default=_in_floats)


def _in_integers(a_NxD, b_FxD):
    return lax.dot_general(a_NxD, b_FxD, ALONG_D, preferred_element_type=jnp.int32)


def _in_floats(a_NxD, b_FxD):
    return lax.dot_general(a_NxD.astype(jnp.float32), b_FxD.astype(jnp.float32), ALONG_D, precision=lax.Precision.HIGHEST)


def _forward(x, w):
    """Keeps codes of x for the gradient of W, and W for that of x, each only where that gradient is asked for."""
    codes_NxD, worth_Nx1 = quantize_rows(x.value)
    codes_FxD, scale = ternary.codes_of(w.value)
    y_NxF = _scaled(integer_product(codes_NxD, codes_FxD), worth_Nx1, scale, x.value.dtype)
    like_x, like_w = jnp.zeros((0,), x.value.dtype), jnp.zeros((0,), w.value.dtype)
    return y_NxF, ((codes_NxD, worth_Nx1) if w.perturbed else None, w.value if x.perturbed else None, like_x, like_w)


def _backward(residuals, g_NxF):
    """The gradient of W first, after which the codes of x can go, then that of x (see layers/linear.py)."""
    of_x, w_FxD, like_x, like_w = residuals
    if isinstance(g_NxF, jax.custom_derivatives.SymbolicZero):
        return None, None
    dw_FxD = None
    if of_x is not None:
        codes_NxD, worth_Nx1 = of_x
        scaled_NxF = (g_NxF.astype(jnp.float32) * worth_Nx1).astype(g_NxF.dtype)
        codes_NxD = codes_NxD.astype(g_NxF.dtype)
        # Rounded to bf16 only if W is in it.
        dw_FxD = lax.dot_general(scaled_NxF, codes_NxD, (((0,), (0,)), ((), ())), preferred_element_type=like_w.dtype)
    if w_FxD is None:
        return None, dw_FxD
    if dw_FxD is not None:
        dw_FxD, g_NxF = lax.optimization_barrier((dw_FxD, g_NxF))
    # Without it, XLA would find codes made twice, and keep the forward pass's until now.
    w_FxD, g_NxF = lax.optimization_barrier((w_FxD, g_NxF))
    codes_FxD, scale = ternary.codes_of(w_FxD)
    return _scaled(g_NxF @ codes_FxD.astype(g_NxF.dtype), scale, 1, like_x.dtype), dw_FxD


_bit_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def packed_linear(x_xD, packed_RxD, scale, features: int, storage: str, implementation="auto"):
    """y = Q(x) W^T, W = scale times the codes in `packed`. Differentiable by x; the weights are constants.

    Args:
      x_xD: bf16 or fp32, any leading axes.
      packed_RxD, scale: uint8 as `ternary.pack` gives it, of F x D codes, and the fp32 number that they are worth.
      features: F.
      storage: 2bit | base3.
      implementation: 'auto': a Pallas kernel where lowered for CUDA and where one block holds all rows, else XLA; 'pallas',
        'xla' or 'interpret': that one.
    Returns:
      y_xF in the dtype of x: what `bit_linear` returns for weights with these codes and scale. Backward keeps nothing of x.
    """
    D, R = x_xD.shape[-1], ternary.packed_rows(features, storage)
    if packed_RxD.shape != (R, D):
        shapes = f"x {x_xD.shape} and {packed_RxD.shape} bytes in {storage}"
        raise ValueError(f"packed_linear: {shapes} do not belong to ({features}, {D}) weights")
    choice = backend.choose("packed_linear", implementation, None)
    x_NxD = x_xD.reshape(-1, D)
    if choice == "auto" and x_NxD.shape[0] > bit_linear_pallas.TILE.rows:
        choice = "xla"
    return _packed(choice, features, storage, x_NxD, packed_RxD, scale).reshape(*x_xD.shape[:-1], features)


def packed_product(implementation: str, features: int, storage: str, codes_NxD, packed_RxD):
    """The integers: int8 codes of x times those in `packed`, (N, F) in int32."""

    def kernel(x, packed, *, interpret):
        return bit_linear_pallas.forward(x, packed, storage=storage, interpret=interpret)[:, :features]

    def xla(x, packed):
        return integer_product(x, ternary.unpack(packed, features, storage)).astype(jnp.int32)

    return backend.dispatch(implementation, kernel, xla, codes_NxD, packed_RxD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _packed(implementation, features, storage, x_NxD, packed_RxD, scale):
    codes_NxD, worth_Nx1 = quantize_rows(x_NxD)
    product_NxF = packed_product(implementation, features, storage, codes_NxD, packed_RxD)
    return _scaled(product_NxF, worth_Nx1, scale, x_NxD.dtype)


def _packed_forward(implementation, features, storage, x_NxD, packed_RxD, scale):
    y_NxF = _packed(implementation, features, storage, x_NxD, packed_RxD, scale)
    return y_NxF, (packed_RxD, scale, jnp.zeros((0,), x_NxD.dtype))


def _packed_backward(implementation, features, storage, residuals, g_NxF):
    packed_RxD, scale, like_x = residuals
    packed_RxD, g_NxF = lax.optimization_barrier((packed_RxD, g_NxF))
    codes_FxD = ternary.unpack(packed_RxD, features, storage).astype(g_NxF.dtype)
    return _scaled(g_NxF @ codes_FxD, scale, 1, like_x.dtype), None, None


_packed.defvjp(_packed_forward, _packed_backward)
