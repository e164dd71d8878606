"""The selective scan: the definition by NumPy and by transformers, XLA and kernels against it, sequences that are cut."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from jaxvram.kernels.selective_scan import selective_scan, selective_scan_reference

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
pytestmark = pytest.mark.usefixtures("quick_compile")
FLOATS = ("x_BxTxE", "dt_BxTxE", "A_ExN", "B_BxTxN", "C_BxTxN")
OPTIONAL = ("D_E", "z_BxTxE", "dt_bias_E", "h_BxExN")


@dataclasses.dataclass(frozen=True)
class Call:
    B: int = 2
    T: int = 70  # beyond one chunk
    E: int = 40
    N: int = 5
    given: tuple = OPTIONAL
    resets: bool = False

    @property
    def names(self):
        return FLOATS + self.given

    def make(self, rng, dtype):
        shape = {"B": self.B, "T": self.T, "E": self.E, "N": self.N}
        arrays = {}
        for name in FLOATS + OPTIONAL:
            value = rng.normal(0, 1, [shape[axis] for axis in name.rpartition("_")[2].split("x")])
            value = -np.exp(value) if name == "A_ExN" else value - 1 if name == "dt_BxTxE" else value
            weight = name in ("A_ExN", "D_E", "dt_bias_E", "h_BxExN")
            arrays[name] = jnp.asarray(value, jnp.float32 if weight else dtype)
        return tuple(arrays[name] for name in self.names)

    def resets_BxT(self):
        return np.random.RandomState(1).rand(self.B, self.T) < 0.1 if self.resets else None

    def run(self, implementation, *arrays):
        options = dict(zip(self.names, arrays, strict=True), resets_BxT=self.resets_BxT())
        if implementation == "definition":
            return selective_scan_reference(**options)
        return selective_scan(**options, implementation=implementation)

    def case(self):
        return proof.Case(self.make, self.run, functools.partial(self.run, "definition"))


CALLS = {
    "bare": Call(given=()),
    "everything": Call(resets=True),
    "one_step": Call(T=1, resets=True),
    "whole_chunks": Call(B=1, T=128, E=64, N=16, given=("D_E", "z_BxTxE")),
    "short": Call(B=3, T=15, E=33, N=1, given=("dt_bias_E",), resets=True),
}


def by_numpy(x, dt, A, B, C, D=None, z=None, bias=None, h=None, resets=None):
    """Step by step in float64."""
    wide = lambda a: None if a is None else np.asarray(a, np.float64)
    x, dt, A, B, C, D, z, bias, h = map(wide, (x, dt, A, B, C, D, z, bias, h))
    h = np.zeros((len(x), *A.shape)) if h is None else h
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        delta = np.logaddexp(0, dt[:, t] + (0 if bias is None else bias))
        if resets is not None:
            h = np.where(resets[:, t, None, None], 0, h)
        h = np.exp(delta[..., None] * A) * h + (delta * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + (0 if D is None else D * x[:, t])
    return y if z is None else y * z / (1 + np.exp(-z)), h


@pytest.mark.parametrize("name", ["bare", "everything", "short"])
def test_the_definition_by_numpy(name):
    call = CALLS[name]
    options = dict(zip(call.names, call.make(np.random.RandomState(0), jnp.float32), strict=True))
    got = selective_scan_reference(**options, resets_BxT=call.resets_BxT())
    want = by_numpy(*(options.get(name) for name in FLOATS + OPTIONAL), call.resets_BxT())
    assert proof.rms_error(got[0], want[0]) < 1e-6 and proof.rms_error(got[1], want[1]) < 1e-6


@pytest.mark.skipif(not INSTALLED, reason="needs torch and transformers")
@pytest.mark.parametrize("gated", [True, False])
def test_equals_transformers(gated):
    """Values and every gradient of its slow path, which has no initial state."""
    import torch
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    call = Call(T=70, E=12, N=16, given=("D_E", "z_BxTxE", "dt_bias_E") if gated else ())
    arrays = call.make(np.random.RandomState(2), jnp.float32)
    tensors = dict(zip(call.names, (torch.tensor(np.asarray(a), requires_grad=True) for a in arrays), strict=True))
    swap = lambda name: None if tensors.get(name) is None else tensors[name].transpose(1, 2)
    y_BxExT, h_BxExN = mamba_selective_scan(
        *(swap(name) for name in ("x_BxTxE", "dt_BxTxE")), tensors["A_ExN"], swap("B_BxTxN"), swap("C_BxTxN"),
        tensors.get("D_E"), swap("z_BxTxE"), tensors.get("dt_bias_E"), delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    outs = y_BxExT.transpose(1, 2), h_BxExN
    weights = [np.random.RandomState(7 + i).normal(0, 1, tuple(o.shape)).astype(np.float32) for i, o in enumerate(outs)]
    sum((o * torch.tensor(w)).sum() for o, w in zip(outs, weights, strict=True)).backward()
    want = [o.detach().numpy() for o in outs] + [tensors[name].grad.numpy() for name in call.names]
    got = proof.value_and_gradients(functools.partial(call.run, "xla"), arrays)  # has these weights too
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name, implementation):
    proof.check_numerics(CALLS[name].case(), jnp.float32, implementation)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_bf16(implementation):
    proof.check_numerics(CALLS["everything"].case(), jnp.bfloat16, implementation)


def test_under_jit_vmap_scan_and_remat():
    proof.check_transforms(Call(B=1, T=9, E=8, N=3, resets=True).case())


def test_xla_under_jit_vmap_scan_and_remat():
    case = Call(B=1, T=67, E=8, N=3, resets=True).case()
    proof.check_transforms(dataclasses.replace(case, call=lambda _, *arrays: case.call("xla", *arrays)))


def cut_scan(call, cuts, implementation, *arrays):
    """The scan of each part from the state that the one before it left, y joined."""
    options = dict(zip(call.names, arrays, strict=True), resets_BxT=call.resets_BxT())
    h_BxExN, parts = options["h_BxExN"], []
    for start, end in zip((0, *cuts), (*cuts, call.T), strict=True):
        part = {name: a[:, start:end] if "BxT" in name else a for name, a in options.items()}
        y_BxLxE, h_BxExN = selective_scan(**part | {"h_BxExN": h_BxExN}, implementation=implementation)
        parts.append(y_BxLxE)
    return jnp.concatenate(parts, axis=1), h_BxExN


@pytest.mark.parametrize("cuts", [(1,), (16, 64), (17, 81), (69,)])
def test_a_sequence_cut_anywhere_equals_the_whole(cuts):
    """Values and gradients, those through the states that are passed on as well."""
    call = Call(B=1, T=100, E=8, N=4, resets=True)
    case = dataclasses.replace(call.case(), call=functools.partial(cut_scan, call, cuts))
    proof.check_numerics(case, jnp.float32, "xla")


def test_kernels_cut_equal_the_whole():
    call = Call(B=1, T=72, E=8, N=4, resets=True)
    case = dataclasses.replace(call.case(), call=functools.partial(cut_scan, call, (67,)))
    proof.check_numerics(case, jnp.float32)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("v", [-9.2, 3.0, 25.0, 100.0])
def test_extreme_step_sizes(v, implementation):
    """delta of 1e-4, where h hardly forgets; of 25 and 100, where exp(delta A) is 0 in fp32: against fp64."""
    call = Call(B=1, T=66, E=32, N=16)
    arrays = list(call.make(np.random.RandomState(3), jnp.float32))
    arrays[1] = arrays[1] * 0.1 + v
    arrays[2] = -jnp.broadcast_to(jnp.arange(1.0, 17.0), (32, 16))
    got = proof.value_and_gradients(functools.partial(call.run, implementation), arrays)
    with jax.enable_x64(True):
        run = functools.partial(call.run, "definition")
        want = proof.value_and_gradients(run, [jnp.asarray(np.asarray(a), jnp.float64) for a in arrays])
    assert all(w.dtype == np.float64 for w in want)
    assert max(proof.rms_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_documents_do_not_see_each_other(implementation):
    """A reset equals a scan that starts there from zeros, and the state before it gets no gradient, not even a tiny one."""
    call = Call(B=1, T=70, E=8, N=4)
    arrays = dict(zip(call.names, call.make(np.random.RandomState(4), jnp.float32), strict=True))
    resets = np.arange(70)[None] == 66
    run = functools.partial(selective_scan, implementation=implementation)
    y, h = run(**arrays, resets_BxT=resets)
    second = {name: a[:, 66:] if "BxT" in name else a for name, a in arrays.items() if name != "h_BxExN"}
    y_second, h_second = run(**second)
    assert proof.rms_error(y[:, 66:], y_second) < 1e-6 and proof.rms_error(h, h_second) < 1e-6
    late = lambda changed: run(**arrays | changed, resets_BxT=resets)[0][:, 66:].sum()
    gradients = jax.grad(late)({name: arrays[name] for name in ("x_BxTxE", "dt_BxTxE", "B_BxTxN", "h_BxExN")})
    assert not gradients.pop("h_BxExN").any()
    assert not any(np.asarray(g[:, :66]).any() for g in gradients.values())
    assert all(np.asarray(g[:, 66:]).any() for g in gradients.values())
