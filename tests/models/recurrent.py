"""A small model of every recurrent kind, with weights; test_recurrent.py asks of all of them what each must do."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import quick
from quick import relative_error

from jaxvram import models
from jaxvram.layers.stack import REMAT
from jaxvram.models.mamba import MambaConfig
from jaxvram.models.mamba2 import Mamba2Config
from jaxvram.models.retnet import RetNetConfig
from jaxvram.models.rwkv4 import RWKV4Config
from jaxvram.models.rwkv5 import RWKV5Config
from jaxvram.models.rwkv6 import RWKV6Config
from jaxvram.models.rwkv7 import RWKV7Config

B, V = 2, 29


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and on what its properties are shown."""

    cfg: object
    noise: tuple  # mean and standard deviation of weights
    on_fresh: bool  # whether a fresh model's are added to that
    T: int  # tokens of a text, more than a chunk where the recurrence goes by chunks
    T_causal: int  # of the one whose every gradient is looked at
    cuts: tuple  # where a text is cut, one test each
    documents: tuple  # (tokens that begin documents, where the text is cut), one test each
    state_bytes: int  # of one sequence, in bf16
    remat: tuple = ()  # one test each
    remat_changes: tuple = ()  # (field, value) of the model in those
    unrolled: tuple = ()  # which of those unroll the layers too
    rematted: int = 1  # bodies of layers in a program


COMMON = {"vocab_size": V, "vocab_multiple": 8, "remat": "none", "dtype": "float32"}
MAMBA = COMMON | {"block_size": 24, "n_layer": 3, "n_embd": 8}
RWKV56 = COMMON | {"block_size": 40, "n_layer": 2, "n_embd": 16, "head_dim": 8, "d_ffn": 24}
ALL_REMAT = tuple(r for r in REMAT if r != "none")
each_token = lambda T: tuple(range(1, T))  # decoding
of_mamba = functools.partial(
    Case, noise=(0.0, 0.3), on_fresh=True, T=24, T_causal=9, cuts=((1, 2, 3), (7,), (11, 23), each_token(24)),
    documents=(((0,), 6), ((1, 2), 6), ((5, 13), 6), ((23,), 6)), remat=ALL_REMAT, remat_changes=(("n_layer", 4),),
    unrolled=("dots",),
)  # fmt: skip
of_rwkv = functools.partial(Case, noise=(0.2, 0.4), on_fresh=False, T=40, T_causal=19)
of_rwkv56 = functools.partial(
    of_rwkv, cuts=((1, 20), each_token(40)), documents=(((20,), 20),), state_bytes=2 * (2 * 16 * 2 + 4 * 16 * 8)
)  # fmt: skip
CASES = {
    "mamba": of_mamba(MambaConfig(**MAMBA, d_state=4), state_bytes=3 * (3 * 16 * 2 + 4 * 16 * 4)),
    "mamba2": of_mamba(
        Mamba2Config(**MAMBA, d_state=8, head_dim=4, n_groups=2), state_bytes=3 * (3 * (16 + 2 * 2 * 8) * 2 + 4 * 16 * 8)
    ),
    # a large eps, as rounding errors are magnified where all values of a head are small
    "retnet": of_mamba(
        RetNetConfig(**MAMBA, n_head=2, d_value=12, n_inner=10, norm_eps=1e-2, tie_head=True),
        state_bytes=3 * (4 * 12 * 4 + 4 + 4),
    ),
    "rwkv4": of_rwkv(
        RWKV4Config(**COMMON, block_size=40, n_layer=3, n_embd=8, d_ffn=12),
        noise=(0.2, 0.6), T=20, T_causal=11, cuts=((1, 12), each_token(20)), documents=(((6, 13), 6),), remat=ALL_REMAT,
        state_bytes=3 * (2 * 8 * 2 + 3 * 8 * 4),
    ),
    # decays of heads and of tokens; with a gate and without
    "rwkv5": of_rwkv56(RWKV5Config(**RWKV56, version="5.0")),
    "rwkv6": of_rwkv56(RWKV6Config(**RWKV56, d_mix=3, d_decay=4), remat=("full",)),
    "rwkv7": of_rwkv(
        RWKV7Config(**RWKV56 | {"n_layer": 3}, d_decay=3, d_rate=3, d_value=2, d_gate=5),
        cuts=((1, 20), (17, 18), each_token(40)), documents=(((9, 30), 9),), remat=ALL_REMAT,
        rematted=2,  # the first layer's, and the others'
        state_bytes=3 * (2 * 16 * 2 + 4 * 16 * 8),
    ),
}  # fmt: skip


def fresh(cfg):
    """A fresh model's weights."""
    return jax.tree.map(np.asarray, quick.jit(_init(cfg))(jax.random.key(0)))


def shapes(cfg):
    return jax.eval_shape(_init(cfg), jax.random.key(0))


def _init(cfg):
    return lambda key: models.build(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def count(cfg):
    """Parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(cfg)))


@functools.cache
def model_and_params(name, **changes):
    """Of a case, with other fields. The weights are far larger than a fresh model's, which hardly listens to its context."""
    case, random = CASES[name], np.random.RandomState(1)
    cfg = dataclasses.replace(case.cfg, **changes)
    params = jax.tree.map(lambda p: random.normal(*case.noise, p.shape).astype(np.float32), shapes(cfg))
    return models.build(cfg), jax.tree.map(np.add, params, fresh(cfg)) if case.on_fresh else params


def tokens(batch, length):
    return np.random.RandomState(0).randint(0, V, (batch, length)).astype(np.int32)


@functools.partial(quick.jit, static_argnums=0)
def run(model, params, tokens_BxT, state=None):
    return model.apply({"params": params}, tokens_BxT, state)


@functools.partial(quick.jit, static_argnums=0)
def logits_and_state(model, params, tokens_BxT):
    """Read from an empty state, so that there is one behind the last token."""
    hidden_BxTxD, state = model.apply({"params": params}, tokens_BxT, empty_state(model, len(tokens_BxT)))
    head_VxD = model.apply({"params": params}, method="head_VxD")
    return hidden_BxTxD @ head_VxD[: model.cfg.vocab_size].T, state


def empty_state(model, batch=B):
    return model.apply({}, batch, method="initial_state")


def run_cut(run, model, params, tokens_BxT, cuts):
    """Hidden states of a text read part by part: what `run` has of each, with the state that it had of the one before."""
    (batch, T), parts = tokens_BxT.shape, []
    state = empty_state(model, batch)
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        part, state = run(model, params, tokens_BxT[:, start:end], state)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def state_bytes(cfg, batch=1):
    state = jax.eval_shape(lambda: empty_state(models.build(cfg), batch))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def assert_equal_gradients(got, want):
    """Of a function of hidden states, which do not know a head of their model's own."""
    got, want = dict(got), dict(want)
    assert set(got) == set(want)
    for gradients in (got, want):
        assert (gradients.pop("lm_head", {"kernel": np.zeros(1)})["kernel"] == 0).all()
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(g, w) < 1e-5
