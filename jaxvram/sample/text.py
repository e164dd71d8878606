"""Text from a language model, one token at a time, with its cache; one compiled program a prompt length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxvram.errors import UserError


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    prompt: str = "\n"  # what to continue
    prompt_file: str = ""  # a text file to continue instead
    chat: bool = False  # --mode=sample answers the lines of standard input, one after the other; instruction data
    num_samples: int = 4  # continuations, side by side
    max_new_tokens: int = 256
    temperature: float = 0.8  # divides the logits; 0: always the likeliest token
    top_k: int = 200  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability (Holtzman et al. 2019)
    seed: int = 1337

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("sample: temperature and top_k must not be negative, top_p must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sample.seed={self.seed} is not in [0, 2^32)")
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise UserError("sample: num_samples and max_new_tokens must be at least 1")


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "temperature", "top_k", "top_p", "vocab_size"))
def generate(
    model, params, prompt_BxP, key, *, new_tokens: int, vocab_size: int, temperature=1.0, top_k=0, top_p=1.0
):
    """`new_tokens` (N) continuations of a prompt.

    Args:
      model: a Linen module of the language model protocol; `context` bounds what it reads back to (T; None: nothing).
      params: its parameters.
      prompt_BxP: int32, P >= 1; of one longer than T only the end is read.
      key: of the draws; row b of step n draws from the n-th split of it.
      vocab_size: tokens from here on are never drawn.
    Returns:
      tokens_BxN. While prompt and text fit T positions (for a recurrent model: always) the model's state carries them;
      afterwards each token is drawn from the last T tokens afresh, as nanoGPT does: with learned positions every entry of a
      cache would move.
    """
    T = model.context or prompt_BxP.shape[1] + new_tokens
    prompt_BxP = prompt_BxP[:, -T:]
    B, P = prompt_BxP.shape
    model, variables = decoder(model), {"params": decoder_params(model, params)}
    head_VxD = model.apply(variables, method="head_VxD")
    keys_N = jax.random.split(key, new_tokens)

    def draw(key, hidden_BxD):
        logits_BxV = jnp.einsum("bd,vd->bv", hidden_BxD, head_VxD, preferred_element_type=jnp.float32)
        return choose(key, logits_BxV[:, :vocab_size], temperature, top_k, top_p)

    n_cached = min(new_tokens, T - P + 1)  # the last of them is not read again
    empty = model.apply(variables, B, P + n_cached - 1, method="initial_state")
    hidden_BxPxD, state = model.apply(variables, prompt_BxP, empty)
    first_B = draw(keys_N[0], hidden_BxPxD[:, -1])

    def cached_step(carry, key):
        token_B, state = carry
        hidden_Bx1xD, state = model.apply(variables, token_B[:, None], state)
        token_B = draw(key, hidden_Bx1xD[:, 0])
        return (token_B, state), token_B

    _, cached_NxB = jax.lax.scan(cached_step, (first_B, state), keys_N[1:n_cached])
    tokens_BxN = jnp.concatenate([first_B[:, None], cached_NxB.T], axis=1)
    if n_cached == new_tokens:
        return tokens_BxN

    def sliding_step(window_BxT, key):
        hidden_BxTxD, _ = model.apply(variables, window_BxT)
        token_B = draw(key, hidden_BxTxD[:, -1])
        return jnp.concatenate([window_BxT[:, 1:], token_B[:, None]], axis=1), token_B

    window_BxT = jnp.concatenate([prompt_BxP, tokens_BxN], axis=1)[:, -T:]
    _, slid_NxB = jax.lax.scan(sliding_step, window_BxT, keys_N[n_cached:])
    return jnp.concatenate([tokens_BxN, slid_NxB.T], axis=1)


def choose(key, logits_BxV, temperature: float, top_k: int, top_p: float):
    """A token a row: argmax at temperature 0, else a draw from the softmax cut by top_k, then by top_p."""
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1)
    logits_BxV = logits_BxV / temperature
    if 0 < top_k < logits_BxV.shape[-1]:
        kth_Bx1 = jax.lax.top_k(logits_BxV, top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, -jnp.inf, logits_BxV)
    if top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        p_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
        before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV  # a token stays if the likelier ones do not reach top_p yet
        smallest_Bx1 = jnp.where(before_BxV < top_p, sorted_BxV, jnp.inf).min(-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < smallest_Bx1, -jnp.inf, logits_BxV)
    return jax.random.categorical(key, logits_BxV, axis=-1)


def decoder(model):
    """The module that decodes for `model`: another one where its weights lie otherwise while they are not trained."""
    return getattr(model, "decoder", model)


def decoder_params(model, params):
    """The parameters of `decoder(model)`, of those of `model`."""
    if hasattr(model, "decoder_params"):
        params = model.decoder_params(params)
    return cast_matrices(params, model.cfg.dtype)


def cast_matrices(params, dtype):
    """Matrices in the compute dtype once, not once a token: decoding reads every one of them for each token."""
    cast = lambda path, p: p.astype(dtype) if getattr(path[-1], "key", "") in ("kernel", "embedding") else p
    return jax.tree_util.tree_map_with_path(cast, params)
