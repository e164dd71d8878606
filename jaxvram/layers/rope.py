"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's scaling of frequencies.

A head of K channels is K / 2 pairs. At position t pair i turns by t omega_i, omega_i = theta^(-2i/K), so that q_t . k_s
depends on t - s alone. Which channels pair up differs: `half` i and i + K/2 (Hugging Face's files, GPT-NeoX), `interleaved`
2i and 2i + 1 (the paper, Meta's and EasyLM's files, GGUF); the same model, its rows of W_q and W_k in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("half", "interleaved")


def frequencies(
    head_dim: int, theta: float, factor: float = 1.0, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0,
    original_context: int = 8192,
) -> np.ndarray:  # fmt: skip
    """omega, (K/2,) in fp32. With factor > 1, as Llama 3.1 has them (arXiv:2407.21783).

    A pair turns original_context omega / 2 pi times within the context that the model was first trained on. One that turns
    more than high_freq_factor times keeps its frequency, one that turns less than low_freq_factor times has it divided by
    `factor`, and between the two the frequency is interpolated, linearly in the number of turns.
    """
    omega_R = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns_R = original_context * omega_R / (2 * np.pi)
    kept_R = np.clip((turns_R - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (omega_R * (kept_R + (1 - kept_R) / factor)).astype(np.float32)


def rotation(first, length: int, omega_R):
    """(cos, sin) of the angles at positions first ... first + length - 1, (T, K/2) in fp32; `first` may be traced."""
    angle_TxR = (first + jnp.arange(length)).astype(jnp.float32)[:, None] * omega_R
    return jnp.cos(angle_TxR), jnp.sin(angle_TxR)


def endless_rotation(first, length: int, omega_R):
    """The same, wherever that is; `rotation`'s fp32 angle is off by up to 0.004 after 65,536 tokens, later by more.

    The angle is counted in 2^-32 of a turn, in integers, which wrap round where a turn is full: two positions differ by
    exactly their distance times a frequency, which is off by 2^-33 of a turn at the most.
    """
    step_R = np.round(np.asarray(omega_R, np.float64) / (2 * np.pi) * 2**32).astype(np.uint32)
    position_Tx1 = (first + jnp.arange(length)).astype(jnp.uint32)[:, None]
    signed_TxR = jax.lax.bitcast_convert_type(position_Tx1 * step_R, jnp.int32)
    angle_TxR = signed_TxR.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    return jnp.cos(angle_TxR), jnp.sin(angle_TxR)


def rotate(x_BxTxHxK, cos_TxR, sin_TxR, layout: str):
    """Each pair (a, b) of channels becomes (a cos - b sin, a sin + b cos); in fp32, back in the dtype of x.

    The backward pass keeps nothing of x: it is linear in it.
    """
    x32_BxTxHxK = x_BxTxHxK.astype(jnp.float32)
    cos_Tx1xR, sin_Tx1xR = cos_TxR[:, None], sin_TxR[:, None]
    if layout == "half":
        a, b = jnp.split(x32_BxTxHxK, 2, axis=-1)
    else:
        a, b = x32_BxTxHxK[..., 0::2], x32_BxTxHxK[..., 1::2]
    turned = a * cos_Tx1xR - b * sin_Tx1xR, a * sin_Tx1xR + b * cos_Tx1xR
    y = jnp.concatenate(turned, axis=-1) if layout == "half" else jnp.stack(turned, axis=-1)
    return y.reshape(x_BxTxHxK.shape).astype(x_BxTxHxK.dtype)
