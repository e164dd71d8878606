"""Linear cross-entropy: every kind of call against the definition, by kernels and by XLA, and the kernels' code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

NAMES = {"linear_cross_entropy_statistics", "linear_cross_entropy_dlogits"}


@dataclasses.dataclass(frozen=True)
class Call:
    shape: tuple = (150,)  # of the targets
    D: int = 96
    V: int = 300
    axis: int = 0
    options: dict = dataclasses.field(default_factory=dict)

    def case(self):
        rng = np.random.RandomState(5)
        counted = self.options.get("vocab_size") or self.V
        targets = np.where(rng.rand(*self.shape) < 0.2, -1, rng.randint(0, counted, self.shape)).astype(np.int32)
        options = dict(self.options, vocab_axis=self.axis)
        reference = {name: value for name, value in options.items() if name != "chunk"}
        return proof.Case(
            self.make,
            lambda implementation, h, w: linear_cross_entropy(h, w, targets, implementation=implementation, **options),
            lambda h, w: linear_cross_entropy_reference(h, w, targets, **reference),
        )

    def make(self, rng, dtype):
        """The head is given in the dtype of hidden, so that the fp32 definition sees the same numbers."""
        head = (self.V, self.D) if self.axis == 0 else (self.D, self.V)
        return jnp.asarray(rng.normal(0, 1, (*self.shape, self.D)), dtype), jnp.asarray(rng.normal(0, 0.3, head), dtype)


CALLS = {
    "plain": Call(),
    "batched": Call((3, 37), V=256),
    "padded": Call(options={"vocab_size": 257}),
    "chunks": Call(options={"chunk": 64, "vocab_size": 290}),
    "untied": Call(axis=1, D=80, V=203),
    "untied_chunks": Call((2, 90), axis=1, D=100, options={"chunk": 32}),
    "smooth": Call(options={"label_smoothing": 0.1, "vocab_size": 280}),
    "z_loss": Call(options={"z_loss": 1e-2}),
    "soft_cap": Call(options={"soft_cap": 3.0, "vocab_size": 290}),
    "l2wrap": Call(V=600, options={"l2wrap": 0.3, "vocab_size": 590, "chunk": 64}),
    "everything": Call((2, 70), D=72, axis=1, options={
        "label_smoothing": 0.2, "z_loss": 1e-2, "soft_cap": 4.0, "vocab_size": 251, "chunk": 50, "l2wrap": 0.3,
    }),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation):
    proof.check_numerics(CALLS[name].case(), jnp.float32, implementation)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_bf16(name):
    proof.check_numerics(CALLS[name].case(), jnp.bfloat16)


@pytest.mark.parametrize("name", ["chunks", "everything"])
def test_under_jit_vmap_scan_and_remat(name):
    proof.check_transforms(CALLS[name].case())


def test_the_definition_by_numpy():
    """Smoothing, z-loss, soft cap and padding as their papers have them, in float64."""
    call = CALLS["everything"]
    h, w = (np.asarray(x, np.float64) for x in call.make(np.random.RandomState(0), np.float32))
    x = 4.0 * np.tanh((h @ w)[..., :251] / 4.0)
    lse = np.log(np.exp(x).sum(-1))
    targets = np.random.RandomState(1).randint(0, 251, call.shape)
    wanted = 0.8 * np.eye(251)[targets] + 0.2 / 251
    want = lse - (wanted * x).sum(-1) + 1e-2 * lse**2
    options = dict(call.options, vocab_axis=1)
    options.pop("chunk")  # l2wrap changes no value
    got = linear_cross_entropy_reference(jnp.float32(h), jnp.float32(w), targets, **options)
    assert proof.rms_error(got[0], want) < 1e-6 and proof.rms_error(got[1], lse) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_axis": 1}, r"head \(300, 96\) with vocab_axis=1 for hidden \(150, 96\)"),
        ({"targets_BxT": np.zeros(3, np.int32)}, r"targets \(3,\) for hidden \(150, 96\)"),
        ({"implementation": "triton"}, "implementation='triton' is none of"),
    ],
)
def test_what_makes_no_sense_is_told(change, message):
    h, w = Call().make(np.random.RandomState(0), jnp.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden_BxTxD": h, "head": w, "targets_BxT": np.zeros(150, np.int32)} | change))


def test_a_dtype_without_a_kernel_is_named():
    h, w = Call().make(np.random.RandomState(0), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="hidden: dtype float8_e4m3fn is not one of"):
        linear_cross_entropy(h, w, np.zeros(150, np.int32), implementation="pallas")


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_l2wrap_is_the_authors(implementation):
    """RWKV-LM's: cross_entropy(logits, targets), and in backward 1e-4 / (B T) max at the largest logit of each token."""
    torch = pytest.importorskip("torch")

    class L2Wrap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, logits):
            ctx.save_for_backward(logits)
            return loss

        @staticmethod
        def backward(ctx, g):
            (logits,) = ctx.saved_tensors
            largest, index = logits.max(-1, keepdim=True)
            return g, torch.zeros_like(logits).scatter_(-1, index, largest * (1e-4 / logits.shape[:-1].numel()))

    rng = np.random.RandomState(3)
    B, T, D, V = 2, 35, 24, 530
    # large logits, or the pull would be lost beside the loss's own gradient; the targets are what is sure already
    h, w = rng.normal(0, 8, (B, T, D)).astype(np.float32), rng.normal(0, 1, (V, D)).astype(np.float32)
    targets = (h @ w.T).argmax(-1).astype(np.int32)
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (h, w)]
    logits = theirs[0] @ theirs[1].T
    loss = torch.nn.functional.cross_entropy(logits.view(-1, V), torch.tensor(targets).long().view(-1))
    L2Wrap.apply(loss, logits).backward()

    def mean(h, w, **options):
        return linear_cross_entropy(h, w, targets, implementation=implementation, **options)[0].mean()

    value, got = jax.jit(jax.value_and_grad(lambda h, w: mean(h, w, l2wrap=1e-4), (0, 1)))(h, w)
    assert abs(value - loss.item()) < 1e-4 and float(value) == float(jax.jit(mean)(h, w))
    assert max(proof.rms_error(g, x.grad) for g, x in zip(got, theirs, strict=True)) < 1e-4
    of_frozen_head = jax.jit(jax.grad(lambda h: mean(h, w, l2wrap=1e-4)))(h)
    assert proof.rms_error(of_frozen_head, got[0]) < 1e-6
    without = jax.jit(jax.grad(mean, (0, 1)))(h, w)
    assert min(proof.rms_error(g, x.grad) for g, x in zip(without, theirs, strict=True)) > 1e-2


def code_of(N, D, V, axis, dtype, vocab_size, **options):
    spec = jax.ShapeDtypeStruct
    head = spec((V, D) if axis == 0 else (D, V), jnp.float32)

    def loss(h, w, targets):
        return linear_cross_entropy(h, w, targets, vocab_size, vocab_axis=axis, **options)[0].sum()

    return jax.value_and_grad(loss, (0, 1)), (spec((N, D), dtype), head, spec((N,), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("card", proof.CARDS)
def test_machine_code(card):
    proof.check_machine_code(*code_of(8192, 768, 50304, 0, jnp.bfloat16, 50257), card, NAMES, True)
    proof.check_machine_code(*code_of(8192, 768, 65536, 1, jnp.bfloat16, None, l2wrap=1e-4), card, NAMES, True)


@pytest.mark.slow
@pytest.mark.parametrize("call", [(1000, 768, 50304, 1, 50257), (1000, 100, 50257, 0, None), (999, 2048, 32003, 1, 32000)])
def test_machine_code_of_odd_sizes(call):
    *sizes, vocab_size = call
    proof.check_machine_code(*code_of(*sizes, jnp.bfloat16, vocab_size), "rtx4070", NAMES, True)
    proof.check_machine_code(*code_of(*sizes, jnp.float32, vocab_size), "rtx4070", NAMES, False)
