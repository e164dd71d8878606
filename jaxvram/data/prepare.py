"""Texts to token files, once, for training from them: tokens as llm.c shards, characters as nanoGPT's files.

Texts are cut into chunks, worker processes tokenise the chunks, and this process writes the tokens in the order of the
text, so that the files do not depend on how many workers there were.
"""

import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxvram.data import TOKENIZERS, shards
from jaxvram.data.binidx import BinidxWriter
from jaxvram.data.file_tokenizers import without_dummy_space
from jaxvram.data.shards import PROGRESS
from jaxvram.data.text import BETWEEN_TEXTS, TEXT_SUFFIXES, decode, named_tokenizer, text_files
from jaxvram.data.tokenizers import CharTokenizer
from jaxvram.errors import UserError, nearest

CHUNK_BYTES = 1 << 20
FORMATS = ("shards", "binidx")
JSON_LINES = ".jsonl"
WORTH_A_WORKER = 8 * CHUNK_BYTES  # a process takes a second to start, in which this one tokenises some MB
# GPT-2's pattern, which is GPT-NeoX's too, never joins a line break to the non-space after it, so the tokens on both
# sides of a cut before such a line break are those of the uncut text. The second class: UTF-8 lead bytes that begin no
# white space.
_CUT = re.compile(rb"(?:(?<=[^\r])\n|\r\n)(?=[\x21-\x7e\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf])")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Bytes [start, stop) of text number `document`."""

    document: int
    file: Path
    start: int
    stop: int

    def text(self) -> str:
        with open(self.file, "rb") as f:
            f.seek(self.start)
            return decode(f.read(self.stop - self.start), self.file, self.start)


def prepare(
    inputs,
    out_dir,
    tokenizer: str = "gpt2",
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    val_fraction: float = 0.1,
    vocab_path: str | None = None,
    download: bool = True,
    layout: str = "shards",
) -> list[Path]:
    """Tokenise `inputs` (a text, a folder of texts, or a list of both) into `out_dir`; returns the files there.

    gpt2, neox, file: shards text_val_000000.bin, text_train_000001.bin, ... of `shard_tokens` (the last may be shorter),
    with <|endoftext|> (file: its end of text) before each text. The val shard is about `val_fraction` of the text if
    that is less. Killed at any moment and started again, it keeps the finished shards and goes on behind them.
    file: `vocab_path` as data.vocab_path. A long text is cut before a line break about every MB; where the tokenizer
    joins line breaks to what stands before or behind them, the tokens next to a cut are not those of the uncut text.
    char: train.bin, val.bin (the last `val_fraction`) and meta.pkl; begins again if it was killed.
    layout='binidx': the pair text.bin and text.idx instead (data/binidx.py), with the end of text (world, neox: 0) behind
    each text, as RWKV's make_data.py has it, and no val split; begins again if it was killed. Here a line of a .jsonl is
    a text, its "text".

    Raises:
      UserError: nothing to read, not UTF-8, or `out_dir` holds something else.
    """
    if tokenizer not in TOKENIZERS:
        raise UserError(f"tokenizer={tokenizer!r} is unknown{nearest(tokenizer, TOKENIZERS)}")
    if layout not in FORMATS:
        raise UserError(f"--format={layout} is unknown{nearest(layout, FORMATS)}")
    if layout == "binidx" and tokenizer == "char":
        raise UserError("--format=binidx is for tokens: give --tokenizer=world, gpt2, neox or file")
    if shard_tokens < 1 or not 0 < val_fraction < 1:
        raise UserError(f"shard_tokens={shard_tokens} must be positive and val_fraction={val_fraction} between 0 and 1")
    if workers is not None and workers < 0:
        raise UserError(f"workers={workers} must not be negative (0: as many as are worth it)")
    files = _texts(inputs, TEXT_SUFFIXES + (JSON_LINES,) * (layout == "binidx"))
    out_dir = Path(out_dir).expanduser()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or max(1, min(cores, _bytes(files) // WORTH_A_WORKER))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if tokenizer == "char":
            return _prepare_chars(files, out_dir, workers, val_fraction)
        made = named_tokenizer(tokenizer, vocab_path, download)  # what is wrong with it is said once, not by each worker
        settings = {"tokenizer": tokenizer} | ({} if tokenizer == "gpt2" else {"vocabulary": made.identity})
        dtype, named = shards.token_dtype(made.vocab_size), (tokenizer, vocab_path, False)
        if layout == "binidx":
            return _prepare_binidx(files, out_dir, settings | {"format": layout}, workers, dtype, named, made.eot)
        settings |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction}
        return _prepare_shards(files, out_dir, settings, workers, dtype, named)
    except BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for want of memory: run again, with fewer workers") from error
    except OSError as error:
        raise UserError(f"could not prepare {out_dir}: {error.strerror or error} ({error.filename})") from error


def _texts(inputs, suffixes: tuple[str, ...]) -> list[Path]:
    paths = [Path(p).expanduser() for p in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give a text file or a folder of texts")
    files = [file for path in paths for file in text_files(path, suffixes) if file.stat().st_size]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no text in there, only empty files")
    return files


def chunks(files: list[Path], start_document: int = 0, start_byte: int = 0) -> Iterator[Chunk]:
    """All texts in pieces of about CHUNK_BYTES, cut where no token can be; from a cut on if a start is given."""
    for document, file in enumerate(files):
        if document < start_document:
            continue
        start = start_byte if document == start_document else 0
        with open(file, "rb") as f:
            size = file.stat().st_size
            while start < size:
                f.seek(min(start + CHUNK_BYTES, size))
                ahead = f.read(1 << 16)
                # a longer stretch without a line break: look further, at worst to the end of the text
                while (cut := _CUT.search(ahead)) is None and (more := f.read(len(ahead))):
                    ahead += more
                stop = min(start + CHUNK_BYTES, size) + (cut.start() if cut else len(ahead))
                yield Chunk(document, file, start, stop)
                start = stop


class _Worker:
    """What runs in each process: one tokenizer, made once."""

    tokenizer = None

    @classmethod
    def start(cls, make, *args):
        if make is not None:
            cls.tokenizer = make(*args)
        if (parent := multiprocessing.parent_process()) is not None:  # else a parent killed by -9 leaves us for ever
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(chunk: Chunk) -> np.ndarray:
    eot = _Worker.tokenizer.eot
    tokens_N = _encode_alone(chunk)
    return np.insert(tokens_N, 0, eot) if chunk.start == 0 and eot is not None else tokens_N


def _encode_alone(chunk: Chunk) -> np.ndarray:
    """Without the end of text."""
    tokenizer = _Worker.tokenizer
    tokens_N = tokenizer.encode(_char_text(chunk) if tokenizer.eot is None else chunk.text())
    return tokens_N if chunk.start == 0 else without_dummy_space(tokenizer, tokens_N)


def _encode_documents(chunk: Chunk) -> list[tuple[np.ndarray, bool]]:
    """Tokens, and whether a document ends with them; then its end of text is one of them."""
    tokenizer = _Worker.tokenizer
    if chunk.file.suffix == JSON_LINES:
        return [(np.append(tokenizer.encode(text), tokenizer.eot), True) for text in _texts_of_lines(chunk)]
    tokens_N, ends = _encode_alone(chunk), chunk.stop == chunk.file.stat().st_size
    return [(np.append(tokens_N, tokenizer.eot) if ends else tokens_N, ends)]


def _texts_of_lines(chunk: Chunk) -> Iterator[str]:
    """A chunk is cut before a line break that begins a line."""
    for line in chunk.text().split("\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{chunk.file} has a line that is no JSON with a "text": {line[:60]!r}')
        yield text


def _char_text(chunk: Chunk) -> str:
    return (BETWEEN_TEXTS if chunk.document and chunk.start == 0 else "") + chunk.text()


def _encode_chars(chunk: Chunk) -> np.ndarray:
    return _Worker.tokenizer.encode(_char_text(chunk)).astype(np.uint16)


def _count_chars(chunk: Chunk) -> tuple[set[str], int]:
    text = _char_text(chunk)
    return set(text), len(text)


def _run(function, todo: Iterator[Chunk], workers: int, label: str, total: int, make=None, args=(), done: int = 0):
    """(chunk, function(chunk)) in the order of the text, a few chunks in flight; `make(*args)` is the tokenizer."""
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        if workers == 1:
            _Worker.start(make, *args)
            for chunk in todo:
                yield chunk, function(chunk)
                bar.update(chunk.stop - chunk.start)
            return
        # spawn: a fork would copy JAX's threads in whatever state they are
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _Worker.start, (make, *args)) as pool:
            flying = collections.deque()
            try:
                for chunk in itertools.chain(todo, itertools.repeat(None)):
                    if chunk is not None:
                        flying.append((chunk, pool.submit(function, chunk)))
                        if len(flying) < 3 * workers:
                            continue
                    if not flying:
                        return
                    first, future = flying.popleft()
                    yield first, future.result()
                    bar.update(first.stop - first.start)
            finally:
                pool.shutdown(cancel_futures=True)


def _prepare_shards(files, out_dir: Path, settings: dict, workers: int, dtype: np.dtype, tokenizer: tuple) -> list[Path]:
    """`tokenizer`: arguments of named_tokenizer, `dtype`: of its tokens."""
    shard_tokens, val_fraction = settings["shard_tokens"], settings["val_fraction"]
    progress = _Progress(out_dir, files, **settings)
    if progress.complete():
        return progress.files()
    document, byte, skip = progress.position()
    size, before = _bytes(files), _bytes(files[:document]) + byte
    todo = chunks(files, document, byte)
    results = _run(_encode, todo, workers, "tokenise", size, named_tokenizer, tokenizer, before)
    stream = _Stream(results, skip)
    val_tokens = max(1, min(shard_tokens, int(size / 4 * val_fraction)))  # English: some 4 bytes a token
    try:
        while not progress.complete():
            number = len(progress.finished)
            name = f"text_{'train' if number else 'val'}_{number:06d}.bin"
            with shards.TokenWriter(out_dir / name, dtype=dtype) as writer:
                for tokens_N in stream.take(shard_tokens if number else val_tokens):
                    writer.append(tokens_N)
                if number == 0 and stream.chunk is None:
                    raise UserError("the text is too short: nothing is left to train on behind the val shard")
            progress.add(name, stream.next_token)
    finally:
        results.close()
    return progress.files()


def _prepare_binidx(files, out_dir: Path, settings: dict, workers: int, dtype, tokenizer: tuple, eot) -> list[Path]:
    """`eot`: the id that ends a text. Arguments else as of _prepare_shards."""
    if eot is None:
        raise UserError(f"--format=binidx puts an end of text behind each text, and --tokenizer={tokenizer[0]} has none")
    progress, prefix = _Progress(out_dir, files, **settings), out_dir / "text"
    index = out_dir / "text.idx"
    if not (progress.complete() and index.is_file()):
        progress.finished.clear()
        results = _run(_encode_documents, chunks(files), workers, "tokenise", _bytes(files), named_tokenizer, tokenizer)
        try:
            with BinidxWriter(prefix, dtype) as writer:
                for tokens_N, ends in itertools.chain.from_iterable(pieces for _, pieces in results):
                    writer.append(tokens_N)
                    if ends:
                        writer.end_document()
        finally:
            results.close()
        progress.add("text.bin", None)
    return [*progress.files(), index]


def _prepare_chars(files, out_dir: Path, workers: int, val_fraction: float) -> list[Path]:
    progress = _Progress(out_dir, files, tokenizer="char", val_fraction=val_fraction)
    meta = out_dir / "meta.pkl"
    if progress.complete() and meta.is_file():
        return [*progress.files(), meta]
    progress.finished.clear()  # where val.bin begins in the text is not kept: both files again
    chars, total = set(), 0
    for _, (found, count) in _run(_count_chars, chunks(files), workers, "characters", _bytes(files)):
        chars |= found
        total += count
    head = int(total * (1 - val_fraction))
    if len(chars) > 1 << 16:
        raise UserError("the text has more than 65,536 distinct characters: take tokenizer=gpt2")
    if not 0 < head < total:
        raise UserError(f"{total:,} characters cannot be split into two: take a longer text or another val_fraction")
    alphabet = "".join(sorted(chars))
    shards.write_nanogpt_meta(meta, alphabet)  # first: train.bin without it would pass for GPT-2 tokens
    results = _run(_encode_chars, chunks(files), workers, "tokenise", _bytes(files), CharTokenizer, (alphabet,))
    stream = _Stream(results, 0)
    try:
        for name, count in (("train.bin", head), ("val.bin", total - head)):
            with shards.TokenWriter(out_dir / name, header=False) as writer:
                for tokens_N in stream.take(count):
                    writer.append(tokens_N)
            progress.add(name, stream.next_token)
    finally:
        results.close()
    return [*progress.files(), meta]


def _bytes(files) -> int:
    return sum(file.stat().st_size for file in files)


class _Stream:
    """The tokens of all chunks in a row, which can be taken by number and knows where it stands."""

    def __init__(self, results, skip: int):
        self.results, self.taken = results, skip
        self.chunk, self.tokens_N = next(results)

    @property
    def next_token(self) -> tuple[int, int, int] | None:
        """(text, byte at which the chunk begins, tokens of it that are taken); None: behind the last."""
        return (self.chunk.document, self.chunk.start, self.taken) if self.chunk else None

    def take(self, count: int) -> Iterator[np.ndarray]:
        while count > 0 and self.chunk is not None:
            piece = self.tokens_N[self.taken : self.taken + count]
            count -= len(piece)
            self.taken += len(piece)
            yield piece
            if self.taken == len(self.tokens_N):
                self.chunk, self.tokens_N, self.taken = *next(self.results, (None, None)), 0


class _Progress:
    """prepare.json: what was asked for, which files are finished, and where in the texts the next one begins."""

    def __init__(self, out_dir: Path, files: list[Path], **settings):
        self.out_dir, self.finished = out_dir, []
        stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        self.request = {"files": stamps, "chunk_bytes": CHUNK_BYTES} | settings
        if (out_dir / PROGRESS).is_file():
            self._resume()
        elif others := sorted(out_dir.glob("*.bin")):
            raise UserError(f"{out_dir} holds {others[0].name}, which was not prepared here: choose another folder")
        self._save()

    def _resume(self):
        try:
            state = json.loads((self.out_dir / PROGRESS).read_text())
            same, finished = state["request"] == self.request, state["finished"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{self.out_dir} was prepared from other texts or settings: choose another, or delete it")
        whole = lambda at: (f := self.out_dir / at["file"]).is_file() and f.stat().st_size == at["bytes"]
        self.finished = list(itertools.takewhile(whole, finished))

    def add(self, name: str, next_token: tuple[int, int, int] | None):
        """`name` is finished; `next_token` as of _Stream."""
        self.finished.append({"file": name, "bytes": (self.out_dir / name).stat().st_size, "next": next_token})
        self._save()

    def complete(self) -> bool:
        return bool(self.finished) and self.finished[-1]["next"] is None

    def position(self) -> tuple[int, int, int]:
        """(text, byte at which a chunk begins, how many of the chunk's tokens are in the finished files)."""
        return tuple(self.finished[-1]["next"]) if self.finished else (0, 0, 0)

    def files(self) -> list[Path]:
        return [self.out_dir / at["file"] for at in self.finished]

    def _save(self):
        part = self.out_dir / (PROGRESS + ".part")
        part.write_text(json.dumps({"request": self.request, "finished": self.finished}))
        os.replace(part, self.out_dir / PROGRESS)
