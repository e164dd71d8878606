"""Features of a cache's captions: the second pass of its preparation, and how they are read while training.

text.json says which encoder made them; for each shard of the cache context_000000.npy, float16 (tokens, E), holds the
features of its different captions one behind the other, without padding, and places_000000.npy, int32 (N, 2), the first
row and the number of rows of each picture's. null.npy is the empty caption's. prompts/ holds those of what was asked for
in samples, so that the encoder is wanted once a prompt.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxvram.data.prepare_images import META, TEXT, is_whole, save, save_array
from jaxvram.data.text_encoders import load_text_encoder
from jaxvram.errors import UserError

NULL, PROMPTS, VERSION = "null.npy", "prompts", 1
PIECE = 1024  # different captions encoded at a time: those of T5-XXL take 1 GB


def prepare_features(out_dir, encoder, path: str, length: int | None = None) -> int:
    """Encodes the captions of the cache in `out_dir`; the number of pictures that have features then.

    Killed and started again it keeps the shards that are whole. An encoder that was moved is found at its new place then.

    Args:
      encoder: as data/text_encoders.py has them.
      path: where a sampler finds it again; `length`: that it was loaded with.
    Raises:
      UserError: no captions, one that is too long, or `out_dir` holds features of another encoder.
    """
    folder = Path(out_dir).expanduser()
    try:
        meta = json.loads((folder / META).read_text())
        if not meta["has_captions"]:
            raise UserError(f"{folder} holds no captions to encode: prepare it from pictures with captions")
        captions = [folder / shard["captions"] for shard in meta["shards"]]
        if not all(is_whole(folder, shard) for shard in meta["shards"]):
            raise ValueError("a shard is missing or cut short")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} or a shard is damaged ({error!r}): prepare the latents again") from error
    said = {
        "version": VERSION, "text_encoder": encoder.identity, "path": path, "context_length": length,
        "length": encoder.length, "width": encoder.width,
    }  # fmt: skip
    try:
        shards = _whole_shards(folder, said)
        left = captions[len(shards) :]
        for file in left:  # shard by shard: the tokens of a million captions would take half a gigabyte
            encoder.check(list(dict.fromkeys(json.loads(file.read_text()))))
        if not shards or not _holds_rows(folder / NULL, encoder.width):
            save_array(folder / NULL, _encode(encoder, [""])[0])
        for file in tqdm(left, unit="shard", desc="encode captions", disable=None):
            shards.append(_encode_shard(folder, file, encoder))
            save(folder / TEXT, json.dumps(said | {"shards": shards}, indent=1).encode())
        if not left:  # its path may be new
            save(folder / TEXT, json.dumps(said | {"shards": shards}, indent=1).encode())
    except OSError as error:
        raise UserError(f"could not prepare {folder}: {error.strerror or error} ({error.filename})") from error
    return sum(shard["images"] for shard in meta["shards"])


def _whole_shards(folder: Path, said: dict) -> list[dict]:
    if not (folder / TEXT).is_file():
        return []
    try:
        before = json.loads((folder / TEXT).read_text())
        whole = list(itertools.takewhile(lambda shard: _is_whole(folder, shard), before["shards"]))
        changed = [key for key in said if before[key] != said[key] and key not in ("path", "context_length")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / TEXT} is damaged: delete it, and prepare the features again") from error
    if changed:
        raise UserError(
            f"{folder} holds features of the text encoder {name_of(before['text_encoder'])} of {before['length']} tokens, "
            f"and you ask for {name_of(said['text_encoder'])} of {said['length']}: delete {folder / TEXT} to make them anew"
        )
    return whole


def _holds_rows(file: Path, width: int) -> bool:
    try:
        return np.load(file).shape[1:] == (width,)
    except (OSError, ValueError):
        return False


def _encode_shard(folder: Path, file: Path, encoder) -> dict:
    captions = json.loads(file.read_text())
    different = list(dict.fromkeys(captions))
    rows = [row for i in range(0, len(different), PIECE) for row in _encode(encoder, different[i : i + PIECE])]
    length_K = np.array([len(row) for row in rows])
    place_of = dict(zip(different, np.stack([np.cumsum(length_K) - length_K, length_K], 1).astype(np.int32), strict=True))
    number = file.stem.split("_")[1]
    files = {"context": f"context_{number}.npy", "places": f"places_{number}.npy"}
    save_array(folder / files["context"], np.concatenate(rows))
    save_array(folder / files["places"], np.stack([place_of[caption] for caption in captions]))
    return files | {"bytes": [(folder / file).stat().st_size for file in files.values()]}


def _encode(encoder, texts: list[str]) -> list[np.ndarray]:
    """Features of each text, as many rows as it has tokens."""
    context_KxSxE, length_K = encoder.encode(texts)
    return [context_SxE[:length] for context_SxE, length in zip(context_KxSxE, length_K, strict=True)]


def _is_whole(folder: Path, shard: dict) -> bool:
    files = [folder / shard[kind] for kind in ("context", "places")]
    return all(f.is_file() and f.stat().st_size == size for f, size in zip(files, shard["bytes"], strict=True))


def name_of(identity: dict) -> str:
    return f"{identity['name']!r} (fingerprint {identity['fingerprint']})"


class Features:
    """What a cache has of its captions: `null`, those of pictures, and of prompts.

    Raises:
      UserError: they are unfinished or damaged.
    """

    def __init__(self, folder: Path, shards: list[dict]):
        self._folder = folder
        try:
            said = json.loads((folder / TEXT).read_text())
            self.identity, self.length, self.width = said["text_encoder"], said["length"], said["width"]
            self._path, self._asked, parts = said["path"], said["context_length"], said["shards"]
            if len(parts) < len(shards):
                raise UserError(f"{folder} is not finished: run --mode=prepare with --text_encoder again, it goes on")
            if not all(_is_whole(folder, part) for part in parts):
                raise ValueError("a shard is missing or cut short")
            self._context = [np.load(folder / part["context"], mmap_mode="r") for part in parts]
            self._places = [np.load(folder / part["places"]) for part in parts]
            if [len(places_Nx2) for places_Nx2 in self._places] != [shard["images"] for shard in shards]:
                raise ValueError("features of other pictures")
            self.null = self._padded(np.load(folder / NULL))
        except (OSError, ValueError, KeyError, TypeError) as error:
            again = f"delete {TEXT}, and run --mode=prepare with --text_encoder again"
            raise UserError(f"{folder / TEXT} or a shard of it is damaged ({error!r}): {again}") from error

    def of_picture(self, shard: int, row: int) -> dict[str, np.ndarray]:
        first, count = self._places[shard][row]
        return self._padded(self._context[shard][first : first + count])

    def of_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Of texts, {"context": float16 (N, S, E), "length": int32 (N,)}: the encoder is read for those that are new.

        Raises:
          UserError: the encoder is not where it was, or is another now; a prompt is too long; or nothing can be kept.
        """
        new = [p for p in dict.fromkeys(prompts) if p and not _holds_rows(self._kept(p), self.width)]
        encoded = _encode(self._encoder(new), new) if new else []
        try:
            for prompt, rows in zip(new, encoded, strict=True):
                (self._folder / PROMPTS).mkdir(exist_ok=True)
                save_array(self._kept(prompt), rows)
            found = [self._padded(np.load(self._kept(prompt))) if prompt else self.null for prompt in prompts]
        except OSError as error:
            where = self._folder / PROMPTS
            raise UserError(f"could not keep prompts in {where}: {error.strerror or error} ({error.filename})") from error
        return {key: np.stack([one[key] for one in found]) for key in self.null}

    def _kept(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self.identity, self.length, prompt], sort_keys=True).encode()).hexdigest()
        return self._folder / PROMPTS / f"{digest[:24]}.npy"

    def _encoder(self, prompts: list[str]):
        try:
            encoder = load_text_encoder(self._path, self._asked)
        except UserError as error:
            raise UserError(
                f"the prompt {prompts[0]!r} is new, and the text encoder of {self._folder} is not where it was ({error}): "
                "run --mode=prepare as before with --text_encoder=WHERE_IT_IS"
            ) from error
        if encoder.identity != self.identity:
            which = f"{self._path} holds {name_of(encoder.identity)} now, and {self._folder} was made with"
            raise UserError(f"{which} {name_of(self.identity)}: prepare its features again")
        return encoder

    def _padded(self, rows_xE: np.ndarray) -> dict[str, np.ndarray]:
        context_SxE = np.zeros((self.length, self.width), np.float16)
        context_SxE[: len(rows_xE)] = rows_xE
        return {"context": context_SxE, "length": np.int32(len(rows_xE))}


def features_of(folder: Path, shards: list[dict]) -> Features | None:
    """Of a cache of these shards; None where it has none."""
    return Features(folder, shards) if (folder / TEXT).is_file() else None
