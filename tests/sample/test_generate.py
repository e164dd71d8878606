"""generate() against a plain loop that keeps no cache, and the draws against the distribution that they claim."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2, GPT2Config
from jaxvram.sample.text import SampleConfig, choose, generate

CFG = GPT2Config(
    vocab_size=21, vocab_multiple=8, block_size=8, n_layer=2, n_head=2, n_embd=12, remat="none", dtype="float32",
    tie_head=False,  # with random weights a tied one repeats the last token for ever
)  # fmt: skip
B, T, V = 3, CFG.block_size, CFG.vocab_size
MODEL = GPT2(CFG)
SAMPLED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
GREEDY = {"temperature": 0}


@functools.cache
def params():
    """Large weights, so that every token of the context tells; in the head's padding what a draw would surely take."""
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    random = np.random.RandomState(0)

    def draw(path, s):
        norm_or_bias = path[-1].key in ("scale", "bias")
        return (random.normal(path[-1].key == "scale", 0.1 if norm_or_bias else 0.3, s.shape)).astype(np.float32)

    params = jax.tree.map_with_path(draw, shapes)
    params["wte"]["embedding"] *= 3
    params["lm_head"]["kernel"][:, V:] *= 100
    return params


def prompt(length):
    return np.random.RandomState(length).randint(0, V, (B, length)).astype(np.int32)


@functools.cache
def compiled(**options):
    """generate() inside a jit that does not optimise; one program a shape and set of options."""
    return quick.jit(lambda params, prompt_BxP, key: generate(MODEL, params, prompt_BxP, key, **options))


@functools.cache
def compiled_choose(**options):
    return quick.jit(lambda key, logits_BxV: choose(key, logits_BxV, **options))


@quick.jit
def last_logits(params, window_BxT, length):
    """Logits at position length - 1; what lies behind it is not seen, the model being causal."""
    hidden_BxTxD, _ = MODEL.apply({"params": params}, window_BxT)
    return hidden_BxTxD[:, length - 1] @ params["lm_head"]["kernel"]


def plain_loop(prompt_BxP, key, new_tokens, vocab_size=V, **options):
    """nanoGPT's: crop to the last T tokens, run the model on all of them, draw, append."""
    draw = compiled_choose(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options))
    text_BxN = prompt_BxP
    for key_of_step in jax.random.split(key, new_tokens):
        cropped = text_BxN[:, -T:]
        window_BxT = np.pad(cropped, ((0, 0), (0, T - cropped.shape[1])))
        logits_BxV = last_logits(params(), window_BxT, cropped.shape[1])[:, :vocab_size]
        text_BxN = np.concatenate([text_BxN, draw(key_of_step, logits_BxV)[:, None]], axis=1)
    return text_BxN[:, prompt_BxP.shape[1] :]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("length", "new_tokens"), [(3, 5), (3, 6), (1, 20), (T, 4), (T + 5, 4), (1, 1)])
def test_equals_a_loop_without_cache(length, new_tokens, options):
    """Token for token: within the context, exactly filling it, and far past it, where the window slides."""
    key = jax.random.key(7)
    got = compiled(new_tokens=new_tokens, vocab_size=V, **options)(params(), prompt(length), key)
    assert got.shape == (B, new_tokens) and got.dtype == jnp.int32
    np.testing.assert_array_equal(got, plain_loop(prompt(length), key, new_tokens, **options))


def test_the_loop_would_notice():
    """The texts are not all the same token, and depend on the prompt, the context and the draws."""
    key = jax.random.key(7)
    greedy = plain_loop(prompt(1), key, 20, **GREEDY)
    assert all(len(set(row[T:])) > 2 for row in greedy.tolist())  # also where the window slides
    assert (greedy != plain_loop(prompt(1), key, 20, **SAMPLED)).any()
    sampled = plain_loop(prompt(1)[:1].repeat(B, 0), key, 20, **SAMPLED)
    assert len({row.tobytes() for row in sampled}) == B  # rows draw for themselves


@pytest.mark.parametrize("vocab_size", [V, 5])
@pytest.mark.parametrize("options", [GREEDY, {}], ids=["greedy", "sampled"])
def test_vocabulary_is_never_left(vocab_size, options):
    """Neither padding (of which the logits are the largest) nor what the data does not have."""
    logits_BxV = np.asarray(last_logits(params(), np.pad(prompt(4), ((0, 0), (0, T - 4))), 4))
    assert logits_BxV.argmax(-1).min() >= V
    tokens = compiled(new_tokens=20, vocab_size=vocab_size, **options)(params(), prompt(1), jax.random.key(0))
    assert 0 <= int(tokens.min()) and int(tokens.max()) < vocab_size


def test_the_cache_has_room_for_the_text_alone():
    """Three tokens and four drawn ones, of which the last is not read: six positions, not the context's eight."""
    run = functools.partial(generate, MODEL, new_tokens=4, vocab_size=V)
    program = str(jax.make_jaxpr(run)(params(), prompt(3), jax.random.key(0)))
    cache = f"f32[{CFG.n_layer},{B},{{}},{CFG.n_head},{CFG.n_embd // CFG.n_head}]"
    assert cache.format(6) in program and cache.format(T) not in program


def test_the_seed_decides():
    run = compiled(new_tokens=20, vocab_size=V)
    texts = [np.asarray(run(params(), prompt(1), jax.random.key(seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()


def test_public_jit_and_bf16():
    """As a user calls it; matrices in the compute dtype, tokens in range."""
    model = GPT2(GPT2Config(**{**CFG.__dict__, "dtype": "bfloat16", "n_layer": 1}))
    one_layer = params() | {"h": jax.tree.map(lambda p: p[:1], params()["h"])}
    tokens = generate(model, one_layer, prompt(3), jax.random.key(0), new_tokens=4, vocab_size=V, top_k=3)
    assert tokens.shape == (B, 4) and 0 <= int(tokens.min()) and int(tokens.max()) < V


P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
TOKEN_OF_RANK = np.array([2, 0, 4, 1, 3])  # the vocabulary is not sorted by probability


def cut(kept):
    q = np.where(np.arange(5) < kept, P, 0)
    return q / q.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, P),
        (0.5, 0, 1.0, P**2 / (P**2).sum()),
        (2.0, 0, 1.0, P**0.5 / (P**0.5).sum()),
        (1.0, 2, 1.0, cut(2)),
        (1.0, 1, 1.0, cut(1)),
        (1.0, 5, 1.0, P),
        (1.0, 200, 1.0, P),
        (1.0, 0, 0.69, cut(2)),  # 0.4 is not 0.69 yet, 0.7 is
        (1.0, 0, 0.71, cut(3)),
        (1.0, 0, 1e-6, cut(1)),  # the likeliest always stays
        (1.0, 3, 0.8, cut(2)),  # top_k first: of the three 0.4 / 0.85 + 0.3 / 0.85 = 0.82 are enough
        (0.5, 0, 0.5, cut(1)),  # temperature first: 0.16 / 0.285 = 0.56
        (0, 0, 1.0, cut(1)),
    ],
)
def test_distribution(temperature, top_k, top_p, expected):
    """Frequencies of 20,000 draws within four standard deviations, and nothing outside of the cut."""
    n = 20_000
    logits_V = np.zeros(5, np.float32)
    logits_V[TOKEN_OF_RANK] = np.log(P) + 3  # any constant
    draw = compiled_choose(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn_N = np.asarray(draw(jax.random.key(0), np.broadcast_to(logits_V, (n, 5))))
    frequency = np.bincount(drawn_N, minlength=5)[TOKEN_OF_RANK] / n
    assert (np.abs(frequency - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all(), frequency


def test_cuts_are_made_for_each_row():
    """Rows with their own likeliest token keep it, not their neighbour's."""
    logits_BxV = np.log([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]).astype(np.float32).repeat(500, 0)
    for top_k, top_p in ((1, 1.0), (0, 0.5)):
        draw = compiled_choose(temperature=1.0, top_k=top_k, top_p=top_p)
        drawn = np.asarray(draw(jax.random.key(0), logits_BxV))
        assert (drawn[:500] == 0).all() and (drawn[500:] == 2).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature and top_k must not be negative"),
        ({"top_k": -1}, "temperature and top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**fields)
