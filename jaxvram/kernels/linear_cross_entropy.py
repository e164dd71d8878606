"""Cross-entropy straight from hidden states and head, without the logits: loss_t = log sum_v e^{h_t . w_v} - h_t . w_{y_t}.

The logits of GPT-2 at 8 x 1024 are 1.6 GB in fp32, and a plain loss holds them two or three times. Here they exist in
pieces. Forward: kernels hold a tile on chip (linear_cross_entropy_pallas.py), XLA holds a chunk of positions. Backward, one
pass over chunks of positions on either path: the chunk's logits once more, their gradient, and the two products with it.
Kept: h, w (which exist anyway) and one fp32 log-sum-exp a token (L2Wrap: 8 bytes more).
FLOPs a token: 2 D V forward, 6 D V backward.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.kernels import backend
from jaxvram.kernels import linear_cross_entropy_pallas as kernels
from jaxvram.kernels.backend import HIDDEN

LOGITS_BUDGET = 128 * 2**20  # bytes of a chunk's logits: fp32 ones on the XLA path, their gradient where kernels run


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of the loss is known when the program is built; see `linear_cross_entropy`."""

    vocab_size: int | None = None
    vocab_axis: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None
    l2wrap: float = 0.0

    def counted(self, V: int) -> int:
        return V if self.vocab_size is None else min(self.vocab_size, V)

    def cap(self, products):
        return products if self.soft_cap is None else self.soft_cap * jnp.tanh(products / self.soft_cap)

    def slope(self, logits):
        """d logits / d (h . w)."""
        return 1.0 if self.soft_cap is None else 1.0 - jnp.square(logits / self.soft_cap)

    def wanted(self, is_target, V: int):
        """The distribution that the loss asks for."""
        onehot = is_target.astype(jnp.float32)
        eps = self.label_smoothing
        return onehot if eps == 0 else (1 - eps) * onehot + eps / self.counted(V)

    def loss(self, lse, target_logit, logits_mean):
        eps = self.label_smoothing
        nats = lse - (1 - eps) * target_logit - (eps * logits_mean if eps else 0)
        return nats + self.z_loss * jnp.square(lse) if self.z_loss else nats


def linear_cross_entropy_reference(hidden_BxTxD, head, targets_BxT, vocab_size=None, **options):
    """The definition, with all logits at once; arguments and results as `linear_cross_entropy` has them."""
    spec = Spec(vocab_size, **options)
    V = head.shape[spec.vocab_axis]
    logits_BxTxV = _logits(spec, hidden_BxTxD, head.astype(hidden_BxTxD.dtype))
    lse_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    is_target = jnp.arange(V) == targets_BxT[..., None]
    target_logit_BxT = jnp.where(is_target, logits_BxTxV, 0).sum(-1)
    mean_BxT = logits_BxTxV[..., : spec.counted(V)].mean(-1)
    loss_BxT = spec.loss(lse_BxT, target_logit_BxT, mean_BxT)
    half_square_BxT = spec.l2wrap / 2 * jnp.square(logits_BxTxV.max(-1))
    loss_BxT += half_square_BxT - jax.lax.stop_gradient(half_square_BxT)  # nothing but a gradient
    return jnp.where(targets_BxT >= 0, loss_BxT, 0), lse_BxT


def linear_cross_entropy(
    hidden_BxTxD, head, targets_BxT, vocab_size=None, *, vocab_axis=0, label_smoothing=0.0, z_loss=0.0, soft_cap=None,
    l2wrap=0.0, chunk=None, implementation="auto",
):  # fmt: skip
    """Loss of each token in nats, and the log-sum-exp of its logits.

    Args:
      hidden_BxTxD: final hidden states, in the compute dtype; or (N, D), with targets (N,).
      head: the output matrix in the parameters' dtype, (V, D), or (D, V) with vocab_axis=1; products are made in the
        dtype of hidden.
      targets_BxT: int32 in [0, vocab_size), or negative to ignore.
      vocab_size: entries of the vocabulary from here on are padding and don't count; None: all count.
      label_smoothing: this share of the wanted distribution is spread evenly over the vocabulary.
      z_loss: adds z_loss lse^2 to the loss of every token (PaLM, arXiv:2204.02311, 5.3).
      soft_cap: logits x become soft_cap tanh(x / soft_cap) (Gemma 2, Grok-1).
      l2wrap: the loss of a token has the gradient of l2wrap / 2 m^2 besides its own, m its largest logit (after the cap),
        and not the value (RWKV-LM's L2Wrap, 1e-4 there). Where the target is negative it has none.
      chunk: positions at a time in the backward pass, and on the XLA path (the last chunk may be short); None: as
        LOGITS_BUDGET allows.
      implementation: 'auto': kernels where the program is lowered for CUDA, else XLA; 'pallas', 'xla' or 'interpret'.
    Returns:
      (loss_BxT, lse_BxT), fp32; the loss is 0 where the target is negative. Both may be differentiated; the gradient of
      the head is accumulated in fp32.
    Raises:
      ValueError: shapes that do not belong together, or a named implementation that does not take the call.
    """
    spec = Spec(vocab_size, vocab_axis, label_smoothing, z_loss, soft_cap, l2wrap)
    if vocab_axis not in (0, 1) or head.ndim != 2 or head.shape[1 - vocab_axis] != hidden_BxTxD.shape[-1]:
        which = f"head {head.shape} with vocab_axis={vocab_axis}"
        raise ValueError(f"linear_cross_entropy: {which} for hidden {hidden_BxTxD.shape}")
    if hidden_BxTxD.shape[:-1] != targets_BxT.shape or hidden_BxTxD.ndim not in (2, 3):
        raise ValueError(f"linear_cross_entropy: targets {targets_BxT.shape} for hidden {hidden_BxTxD.shape}")
    dtype = hidden_BxTxD.dtype
    known = dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    obstacle = None if known else f"hidden: dtype {dtype} is not one of bfloat16, float16, float32"
    choice = backend.choose("linear_cross_entropy", implementation, obstacle)
    batched = hidden_BxTxD.reshape(-1, *hidden_BxTxD.shape[-2:])  # (N, D) is one row of N
    loss, lse = _loss(spec, chunk, choice, batched, head, targets_BxT.reshape(batched.shape[:2]))
    return loss.reshape(targets_BxT.shape), lse.reshape(targets_BxT.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(spec: Spec, chunk, implementation: str, hidden_BxTxD, head, targets_BxT):
    no_gradient = dataclasses.replace(spec, l2wrap=0.0)
    return _results(no_gradient, chunk, implementation, hidden_BxTxD, head, targets_BxT)[0]


def _forward(spec, chunk, implementation, *primals):
    hidden_BxTxD, head, targets_BxT = (primal.value for primal in primals)
    results, peak = _results(spec, chunk, implementation, hidden_BxTxD, head, targets_BxT)
    is_frozen = None if primals[1].perturbed else ()  # a tree's form, so that it is known when the backward pass is traced
    return results, (hidden_BxTxD, head, targets_BxT, results[1], peak, is_frozen)


def _results(spec, chunk, implementation, hidden_BxTxD, head, targets_BxT):
    """((loss, lse), (the largest logit, where it is) or, without L2Wrap, ()), (B, T) each."""
    cast = head.astype(hidden_BxTxD.dtype)
    lse_BxT, target_logit_BxT, sum_BxT, *peak = backend.dispatch(
        implementation,
        functools.partial(_statistics_by_kernel, spec),
        functools.partial(_statistics_by_xla, spec, chunk),
        hidden_BxTxD, cast, targets_BxT,
    )  # fmt: skip
    loss_BxT = spec.loss(lse_BxT, target_logit_BxT, sum_BxT / spec.counted(head.shape[spec.vocab_axis]))
    return (jnp.where(targets_BxT >= 0, loss_BxT, 0), lse_BxT), tuple(peak)


def _statistics_by_kernel(spec, hidden_BxTxD, head, targets_BxT, *, interpret):
    flat = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
    found = kernels.row_statistics(spec, flat, head, targets_BxT.reshape(-1), interpret=interpret)
    return tuple(x.reshape(targets_BxT.shape) for x in found)


def _logits(spec, hidden_BxCxD, head):
    """Capped logits in fp32; HIDDEN where they don't count."""
    product = "bcd,vd->bcv" if spec.vocab_axis == 0 else "bcd,dv->bcv"
    if hidden_BxCxD.ndim == 2:
        product = product.replace("b", "")
    logits_BxCxV = spec.cap(jnp.einsum(product, hidden_BxCxD, head, preferred_element_type=jnp.float32))
    V = head.shape[spec.vocab_axis]
    return logits_BxCxV if spec.counted(V) == V else jnp.where(jnp.arange(V) < spec.counted(V), logits_BxCxV, HIDDEN)


def _statistics_by_xla(spec, chunk, hidden_BxTxD, head, targets_BxT):
    V = head.shape[spec.vocab_axis]

    def of_chunk(_, chunk_of):
        hidden_BxCxD, targets_BxC = chunk_of
        logits_BxCxV = _logits(spec, hidden_BxCxD, head)
        # A gather from logits would have to hold them; a masked sum fuses with the product that makes them.
        is_target_BxCxV = jnp.arange(V) == targets_BxC[..., None]
        target_logit_BxC = jnp.where(is_target_BxCxV, logits_BxCxV, 0).sum(-1)
        sum_BxC = jnp.zeros_like(target_logit_BxC)
        if spec.label_smoothing:
            sum_BxC = jnp.where(jnp.arange(V) < spec.counted(V), logits_BxCxV, 0).sum(-1)
        found = jax.nn.logsumexp(logits_BxCxV, axis=-1), target_logit_BxC, sum_BxC
        if spec.l2wrap:
            largest_BxC = logits_BxCxV.max(-1)
            is_largest_BxCxV = logits_BxCxV == largest_BxC[..., None]
            found += largest_BxC, jnp.where(is_largest_BxCxV, jnp.arange(V), V).min(-1)  # the first, as torch.max has it
        return None, found

    C = chunk or chunk_length(4, *hidden_BxTxD.shape[:2], V)
    return _over_chunks(of_chunk, None, C, hidden_BxTxD, targets_BxT)[1]


def _backward(spec, chunk, implementation, residuals, cotangents):
    """With p the softmax: dlogits = (p (g (1 + 2 z lse) + g_lse) - wanted g) slope;  dh = dlogits w;  dw = dlogits^T h.

    L2Wrap adds `pull` = l2wrap g m to the gradient of the largest logit m, before the slope. dw is not made where the head
    is frozen.
    """
    hidden_BxTxD, head, targets_BxT, lse_BxT, peak, is_frozen = residuals
    is_zero = lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero)
    g_BxT, g_lse_BxT = (jnp.zeros(g.shape, g.dtype) if is_zero(g) else g for g in cotangents)
    g_BxT = jnp.where(targets_BxT >= 0, g_BxT, 0)
    weight_BxT = g_BxT * (1 + 2 * spec.z_loss * lse_BxT) + g_lse_BxT
    if peak:
        largest_BxT, argmax_BxT = peak
        peak = spec.l2wrap * g_BxT * largest_BxT, argmax_BxT
    dhidden_BxTxD, dhead = backend.dispatch(
        implementation,
        functools.partial(_gradients_by_kernel, spec, chunk, is_frozen is None),
        functools.partial(_gradients_by_xla, spec, chunk, is_frozen is None),
        hidden_BxTxD, head.astype(hidden_BxTxD.dtype), targets_BxT, lse_BxT, weight_BxT, g_BxT, *peak,
    )  # fmt: skip
    no_gradient = np.zeros(targets_BxT.shape, jax.dtypes.float0)
    return dhidden_BxTxD, None if dhead is None else dhead.astype(head.dtype), no_gradient


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradients_by_kernel(spec, chunk, wants_head, hidden_BxTxD, head, *rows_BxT, interpret):
    N = hidden_BxTxD.shape[0] * hidden_BxTxD.shape[1]
    one_row = lambda x: x.reshape(1, N, *x.shape[2:])

    def dlogits(hidden_1xCxD, *rows_1xC):
        return kernels.dlogits(spec, hidden_1xCxD[0], head, *(x[0] for x in rows_1xC), interpret=interpret)[None]

    C = chunk or chunk_length(hidden_BxTxD.dtype.itemsize, 1, N, head.shape[spec.vocab_axis])
    rows_1xN = map(one_row, rows_BxT)
    dhidden_1xNxD, dhead = _gradients(spec, C, wants_head, dlogits, one_row(hidden_BxTxD), head, *rows_1xN)
    return dhidden_1xNxD.reshape(hidden_BxTxD.shape), dhead


def _gradients_by_xla(spec, chunk, wants_head, hidden_BxTxD, head, *rows_BxT):
    V = head.shape[spec.vocab_axis]

    def dlogits(hidden_BxCxD, targets_BxC, lse_BxC, weight_BxC, g_BxC, *peak):
        logits_BxCxV = _logits(spec, hidden_BxCxD, head)
        p_BxCxV = jnp.exp(logits_BxCxV - lse_BxC[..., None])
        wanted_BxCxV = spec.wanted(jnp.arange(V) == targets_BxC[..., None], V)
        dlogits_BxCxV = p_BxCxV * weight_BxC[..., None] - wanted_BxCxV * g_BxC[..., None]
        if peak:
            pull_BxC, argmax_BxC = peak
            dlogits_BxCxV += jnp.where(jnp.arange(V) == argmax_BxC[..., None], pull_BxC[..., None], 0)
        dlogits_BxCxV *= spec.slope(logits_BxCxV)
        if spec.counted(V) < V:
            dlogits_BxCxV = jnp.where(jnp.arange(V) < spec.counted(V), dlogits_BxCxV, 0)
        return dlogits_BxCxV.astype(hidden_BxCxD.dtype)

    C = chunk or chunk_length(4, *hidden_BxTxD.shape[:2], V)
    return _gradients(spec, C, wants_head, dlogits, hidden_BxTxD, head, *rows_BxT)


def _gradients(spec, C, wants_head: bool, dlogits, hidden_BxTxD, head, *rows_BxT):
    """(dhidden, dhead in fp32 or None): chunk after chunk, `dlogits` and the products with it."""
    by_hidden, by_head = ("bcv,vd->bcd", "bcv,bcd->vd") if spec.vocab_axis == 0 else ("bcv,dv->bcd", "bcv,bcd->dv")

    def of_chunk(dhead, chunk_of):
        hidden_BxCxD, *rows_BxC = chunk_of
        dlogits_BxCxV = dlogits(hidden_BxCxD, *rows_BxC)
        if wants_head:
            dhead += jnp.einsum(by_head, dlogits_BxCxV, hidden_BxCxD, preferred_element_type=jnp.float32)
        return dhead, jnp.einsum(by_hidden, dlogits_BxCxV, head)

    dhead = jnp.zeros(head.shape, jnp.float32) if wants_head else None
    dhead, dhidden_BxTxD = _over_chunks(of_chunk, dhead, C, hidden_BxTxD, *rows_BxT)
    return dhidden_BxTxD, dhead


def _over_chunks(of_chunk, carry, C, *arrays_BxTx):
    """scan(of_chunk) over chunks of C positions, and once more for a shorter rest; B stays whole, as it may be sharded."""
    T = arrays_BxTx[0].shape[1]
    if C >= T:
        return of_chunk(carry, arrays_BxTx)
    n = T // C
    split = lambda x: jnp.moveaxis(x[:, : n * C].reshape(x.shape[0], n, C, *x.shape[2:]), 1, 0)
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], n * C, *y.shape[3:])
    carry, ys = jax.lax.scan(of_chunk, carry, jax.tree.map(split, arrays_BxTx))
    ys = jax.tree.map(join, ys)
    if n * C < T:
        carry, rest = of_chunk(carry, tuple(x[:, n * C :] for x in arrays_BxTx))
        ys = jax.tree.map(lambda y, r: jnp.concatenate([y, r], axis=1), ys, rest)
    return carry, ys


def chunk_length(itemsize: int, B: int, T: int, V: int) -> int:
    """Positions of T whose logits over a batch of B stay within LOGITS_BUDGET, at least one; a power of two if < T."""
    longest = max(1, LOGITS_BUDGET // (itemsize * B * V))
    return T if longest >= T else 2 ** (longest.bit_length() - 1)
