"""Text encoders' sizes and properties: padding is never read, CLIP looks back alone, remat changes nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.models.text_encoder import (
    HASH_FACTOR,
    CLIPText,
    CLIPTextConfig,
    SmallTextConfig,
    SmallTextEncoder,
    T5Config,
    T5Encoder,
    ngram_hash,
)

SMALL = SmallTextConfig(vocab_size=17, length=7, n_layer=2, n_head=2, n_embd=8, dtype="float32")
NGRAMS = dataclasses.replace(SMALL, ngrams=(2, 4), ngram_rows=64)
CLIP = CLIPTextConfig(**dataclasses.asdict(SMALL) | {"causal": True, "activation": "quick_gelu"})
T5 = T5Config(
    vocab_size=17, n_layer=2, n_head=2, head_dim=3, n_embd=8, mlp_width=12, dtype="float32", param_dtype="float32"
)
ENCODERS = {"small": SmallTextEncoder(SMALL), "clip": CLIPText(CLIP), "t5": T5Encoder(T5)}
ENCODERS["ngrams"] = SmallTextEncoder(NGRAMS)
TOKENS, LENGTHS = np.random.RandomState(0).randint(0, 17, (2, 7)).astype(np.int32), np.int32([7, 3])


@functools.cache
def grown(name):
    """No weight is what it begins with: fresh ones are so small that nothing attends to anything."""
    shapes = jax.eval_shape(lambda: ENCODERS[name].init(jax.random.key(0), TOKENS, LENGTHS)["params"])
    random = np.random.RandomState(1)
    return jax.tree.map(lambda p: random.normal(0, 0.5, p.shape).astype(np.float32), shapes)


@functools.partial(quick.jit, static_argnums=0)
def run(model, params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths)


def test_parameter_counts():
    """ViT-L/14's text half and the encoder of T5 v1.1 XXL, as transformers counts them."""
    for model, want in ((CLIPText(CLIPTextConfig()), 123_060_480), (T5Encoder(T5Config()), 4_762_310_656)):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])  # noqa: B023
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == want


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_is_not_read(name):
    """A caption's own tokens come out the same whatever stands behind its end, and alone without any padding."""
    params, other = grown(name), TOKENS.copy()
    other[1, 3:] = 16 - other[1, 3:]
    out, changed = run(ENCODERS[name], params, TOKENS, LENGTHS), run(ENCODERS[name], params, other, LENGTHS)
    assert quick.relative_error(changed[1, :3], out[1, :3]) == 0
    alone = run(ENCODERS[name], params, TOKENS[1:, :3], LENGTHS[1:])
    assert quick.relative_error(alone[0], out[1, :3]) < 1e-5
    full = run(ENCODERS[name], params, TOKENS, np.int32([7, 7]))
    assert quick.relative_error(full[1, :3], out[1, :3]) > 1e-3 or name == "clip"  # causal: behind is unseen anyway


@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_token_sees(name):
    """By gradient: with CLIP what came before it, with the others the whole caption."""
    params = grown(name)
    of_token = lambda rows_SxE: {"embedding": jnp.asarray(params["token"]["embedding"]).at[:7].set(rows_SxE)}
    first = lambda rows_SxE: ENCODERS[name].apply({"params": params | {"token": of_token(rows_SxE)}}, ids)[0, :, 0]
    ids = np.arange(7, dtype=np.int32)[None]
    slopes_SxSxE = quick.jit(jax.jacrev(first))(params["token"]["embedding"][:7])
    seen_SxS = np.abs(slopes_SxSxE).max(-1) > 0
    assert (seen_SxS == (np.tri(7, dtype=bool) if name == "clip" else True)).all()


def test_ngrams_are_hashed_as_written():
    """In whole numbers of Python; the beginning of a caption counts, what comes after a token does not."""
    tokens = np.random.RandomState(2).randint(0, 259, (2, 7)).astype(np.int32)
    for n, rows in ((2, 64), (4, 4096), (9, 1000)):
        for caption, row in zip(tokens.tolist(), ngram_hash(tokens, n, rows).tolist(), strict=True):
            for s in range(7):
                run_of_ids = ([0] * n + [i + 1 for i in caption])[s + 1 : s + 1 + n]
                h = sum(i * HASH_FACTOR**j for j, i in enumerate(reversed(run_of_ids))) % 2**32
                h = (h ^ h >> 15) * HASH_FACTOR % 2**32
                assert row[s] == (h ^ h >> 16) % rows


def test_ngrams_spread_over_their_rows():
    """All pairs of letters, in as many rows: at random 1 - 1/e = 63 % of the rows are met."""
    letters = np.arange(97, 123, dtype=np.int32)
    pairs = np.stack(np.meshgrid(letters, letters), -1).reshape(-1, 2)
    met = len(np.unique(ngram_hash(pairs, 2, len(pairs))[:, 1]))
    assert 0.58 < met / len(pairs) < 0.68


@pytest.mark.parametrize("n", [2, 4])
def test_ngrams_are_read(n):
    """The table of each length has a gradient, in the rows of its runs alone."""
    ids, params, model = TOKENS[:1], grown("ngrams"), ENCODERS["ngrams"]
    slopes = quick.jit(jax.grad(lambda params: model.apply({"params": params}, ids)[..., 0].sum()))(params)
    touched = np.flatnonzero(np.abs(slopes[f"ngram_{n}"]["embedding"]).max(-1))
    assert touched.tolist() == np.unique(ngram_hash(ids, n, 64)).tolist()


@pytest.mark.parametrize("name", ["small", "ngrams", "t5"])
def test_remat_changes_nothing(name):
    params, model = grown(name), ENCODERS[name]

    def gradients(remat):
        again = type(model)(dataclasses.replace(model.cfg, remat=remat))
        return quick.jit(jax.grad(lambda params: again.apply({"params": params}, TOKENS, LENGTHS)[:, :3].sum()))(params)

    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, gradients("full"), gradients("none")))) < 1e-5


def test_dtypes():
    """A denoiser is given its own compute dtype; T5 gives fp32, whatever it multiplies in."""
    of = lambda model: jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), TOKENS, LENGTHS)[0])
    assert of(SmallTextEncoder(dataclasses.replace(SMALL, dtype="bfloat16"))).dtype == jnp.bfloat16
    assert of(T5Encoder(dataclasses.replace(T5, dtype="bfloat16", param_dtype="bfloat16"))).dtype == jnp.float32


def test_errors():
    for make, message in (
        (lambda: SmallTextConfig(remat="ful"), "remat='ful' is unknown.*full"),
        (lambda: SmallTextConfig(activation="relu"), "activation='relu' is unknown"),
        (lambda: SmallTextConfig(n_embd=10, n_head=4), "n_embd=10 is not a multiple of n_head=4"),
        (lambda: SmallTextConfig(length=0), "must be at least 1"),
        (lambda: SmallTextConfig(ngrams=(3, 1)), r"ngrams=\(3, 1\) must be different whole numbers"),
        (lambda: SmallTextConfig(ngrams=(3, 3)), r"ngrams=\(3, 3\) must be different whole numbers"),
        (lambda: T5Config(buckets=6), "buckets a multiple of 4"),
        (lambda: T5Config(dtype="float16"), "dtype='float16' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    with pytest.raises(ValueError, match="captions of 7 tokens for a text encoder of 5"):
        SmallTextEncoder(dataclasses.replace(SMALL, length=5)).init(jax.random.key(0), TOKENS)
