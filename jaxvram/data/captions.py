"""Captions in the shards of a cache, and as a model with a text encoder of its own reads them: the bytes of each."""

import json
from pathlib import Path

import numpy as np

from jaxvram.data.text_encoders import ByteTokens
from jaxvram.errors import UserError


def to_lines(captions: list[str]) -> bytes:
    """A JSON list with one caption a line, whatever stands in it, so that `CaptionFiles` finds each by its line."""
    return json.dumps(captions, indent=0).encode()


class CaptionFiles:
    """The captions of shards, read from the disk when they are asked for: in memory is where each line begins.

    Files that `to_lines` filled; 8 bytes a caption, 20 us to read one.
    """

    def __init__(self, files: list[Path]):
        self._files, self._ends = files, [None] * len(files)

    def read(self, shard: int, row: int) -> str:
        file = self._files[shard]
        if self._ends[shard] is None:
            self._ends[shard] = np.flatnonzero(np.fromfile(file, np.uint8) == ord("\n"))
        start, stop = map(int, self._ends[shard][row : row + 2])
        with open(file, "rb") as opened:
            opened.seek(start + 1)
            return json.loads(opened.read(stop - start - 1).rstrip(b","))


class TokenCaptions:
    """A source of images with captions, of which batches hold "tokens" (int32 (B, S)) and "length" (int32 (B,)) as well.

    `null` is the empty caption without the batch's axis, `encode_prompts(prompts)` what a batch says of other texts.
    Everything else is the source's own.
    """

    def __init__(self, source, length: int):
        if not source.has_captions:
            raise UserError(f"the model reads text, and these data have no captions: {source.description}")
        self._source, self._tokens = source, ByteTokens(length)
        self.identity = source.identity | {"captions": "bytes"}
        self.null = {key: rows[0] for key, rows in self.encode_prompts([""]).items()}

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        captions = self._source.captions(split, n, batch_size, rows)
        return self._source.batch(split, n, batch_size, rows) | self.encode_prompts(captions)

    def encode_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        tokens_BxS, length_B = self._tokens.encode(prompts)
        return {"tokens": tokens_BxS, "length": length_B}
