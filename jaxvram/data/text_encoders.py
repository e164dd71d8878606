"""Captions to what a denoiser reads of them: token ids, or features of a text encoder that is not trained with it."""

import numpy as np

from jaxvram.errors import UserError

BEGIN, END, PAD = 256, 257, 258  # behind the 256 bytes


class ByteTokens:
    """A caption as the bytes of its UTF-8, with a mark before and behind: needs no vocabulary file."""

    vocab_size = 259

    def __init__(self, length: int):
        if length < 2:
            raise UserError(f"context_length={length} leaves no room: a caption's two marks take 2")
        self.length = length  # S

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 (N, S) padded with PAD, int32 (N,) how many count). UserError: a caption is too long."""
        rows = [[BEGIN, *caption.encode("utf-8", "replace"), END] for caption in captions]
        return padded(rows, captions, self.length, PAD)


def padded(rows: list[list[int]], captions: list[str], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids in one array, int32 (N, S), and their lengths; nothing is cut."""
    tokens_NxS = np.full((len(rows), length), pad, np.int32)
    for tokens_S, row, caption in zip(tokens_NxS, rows, captions, strict=True):
        if len(row) > length:
            shown = caption if len(caption) <= 60 else caption[:57] + "..."
            raise UserError(
                f"the caption {shown!r} takes {len(row)} tokens, and the text encoder reads {length}: shorten it (it is "
                "never cut), or choose a longer context_length where the encoder allows it"
            )
        tokens_S[: len(row)] = row
    return tokens_NxS, np.array([len(row) for row in rows], np.int32)
