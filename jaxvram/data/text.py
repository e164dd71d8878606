"""Text and token files as a source of batches: where a text comes from, and how windows are cut from it."""

import glob
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxvram.data.binidx import prefix_of, read_binidx
from jaxvram.data.download import cache_dir, fetch, lfs_sha256
from jaxvram.data.file_tokenizers import file_tokenizer, neox_tokenizer
from jaxvram.data.magic_prime import magic_prime
from jaxvram.data.order import SPLITS, example_indices
from jaxvram.data.shards import check_prepared, check_vocabulary, find_shards, read_nanogpt, read_shard, token_dtype
from jaxvram.data.tokenizers import CharTokenizer, gpt2_tokenizer
from jaxvram.data.world_tokenizer import world_tokenizer
from jaxvram.errors import UserError, nearest

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_TRAIN_SHARDS = 103
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
BETWEEN_TEXTS = "\n\n"  # of a folder, where the tokenizer has no id (<|endoftext|>) for that
MAX_TEXT_BYTES = 1 << 29  # a text is tokenised in memory, at each start: more is a case for --mode=prepare


class TokenSource:
    """Windows of `block_size` tokens and the tokens that follow them, cut from arrays (memory maps) of tokens.

    order 'random': any window; 'shuffled', 'magic_prime': windows that do not overlap. No window spans two arrays.
    """

    def __init__(self, train: list, val: list, tokenizer, block_size: int, seed: int, order: str, what: str):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.sequence_length = self.example_size = block_size
        self.seed, self.order = seed, order
        self._windows, self._ends = {}, {}
        for split, arrays in zip(SPLITS, (train, val), strict=True):
            stride = 1 if order == "random" else block_size
            views = [sliding_window_view(a, block_size + 1)[::stride] for a in arrays if len(a) > block_size]
            if not views:
                longest = max((len(a) for a in arrays), default=0)
                raise UserError(
                    f"{what}: the {split} split has {longest:,} tokens, fewer than model.block_size + 1 = "
                    f"{block_size + 1}; take a longer text, a smaller block_size or another data.val_fraction"
                )
            self._windows[split], self._ends[split] = views, np.cumsum([len(v) for v in views])
            for array in arrays:  # the head of each file now, the rest as it is read
                self._check(array[: 1 << 16])
        sizes = [sum(len(a) for a in arrays) for arrays in (train, val)]
        self.description = (
            f"{what}: {sizes[0]:,} tokens to train on, {sizes[1]:,} held out, {self.vocab_size:,} in the vocabulary"
        )
        if order == "magic_prime":
            self.description += f"; the order's prime is {magic_prime(int(self._ends['train'][-1])):,}"

    def batch(self, split: str, n: int, batch_size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}: int32 (rows, block_size), a function of (seed, split, n) alone."""
        views, ends = self._windows[split], self._ends[split]
        index_B = example_indices(self.order, self.seed, split, n, batch_size, rows, int(ends[-1]))
        if len(views) == 1:
            window_BxS = views[0][index_B]
        else:
            shard_B = np.searchsorted(ends, index_B, side="right")
            window_BxS = np.empty((len(index_B), self.sequence_length + 1), views[0].dtype)
            for shard in np.unique(shard_B):
                here_B = shard_B == shard
                window_BxS[here_B] = views[shard][index_B[here_B] - (ends[shard] - len(views[shard]))]
        self._check(window_BxS)
        return {"tokens": window_BxS[:, :-1].astype(np.int32), "targets": window_BxS[:, 1:].astype(np.int32)}

    def _check(self, tokens: np.ndarray):
        if not tokens.size:
            return
        largest, smallest = int(tokens.max()), int(tokens.min()) if tokens.dtype.kind == "i" else 0
        if largest >= self.vocab_size or smallest < 0:
            wrong = smallest if smallest < 0 else largest
            raise UserError(
                f"the data holds token {wrong}, but the {self.tokenizer.name} vocabulary ends at "
                f"{self.vocab_size - 1}: the files were made with another tokenizer, or are damaged"
            )


def load_text(cfg, block_size: int, seed: int) -> TokenSource:
    """The source of data.name='text': data.path if given, else data.dataset."""
    if cfg.path is not None:
        train, val, tokenizer, what = _from_path(cfg)
    elif cfg.dataset == "fineweb":
        train, val, tokenizer, what = _fineweb(cfg)
    else:
        text, what = (offline_text(), "Python's help text") if cfg.dataset == "offline" else _shakespeare(cfg)
        train, val, tokenizer = _tokenise([text], cfg, what)
    if cfg.order == "magic_prime":
        train, val = _in_one_piece(train, val, block_size, what)
    return TokenSource(train, val, tokenizer, block_size, seed, cfg.order, what)


def _in_one_piece(train: list, val: list, block_size: int, what: str) -> tuple[list, list]:
    """What order=magic_prime reads. With val_fraction=0, val is what it never comes to: the windows behind the prime."""
    if len(train) != 1:
        raise UserError(
            f"data.order=magic_prime reads one text, and {what} has {len(train)} to train on: join them with "
            "--mode=prepare --format=binidx, or set data.order=shuffled"
        )
    prime = magic_prime(max(len(train[0]) - 1, 0) // block_size)
    return train, val if any(len(a) for a in val) else [train[0][prime * block_size :]]


def _from_path(cfg):
    """(train arrays, val arrays, tokenizer, one-line name) of whatever lies at data.path."""
    path = Path(cfg.path).expanduser()
    if (prefix := _binidx_at(path)) is not None:
        return *_binidx(prefix, cfg), str(path)
    if not path.exists() and not glob.has_magic(str(path)):
        parent = path.parent if path.parent.is_dir() else None
        hint = nearest(path.name, os.listdir(parent)[:20]) if parent else f"; nor is there a folder {path.parent}"
        raise UserError(f"data.path={cfg.path} does not exist{hint}")
    if (path / "train.bin").exists() or (path / "val.bin").exists():
        train, val, tokenizer = read_nanogpt(path)
        if (tokenizer is None) == (cfg.tokenizer == "char"):
            made, other = ("gpt2 (or what made them)", "no") if tokenizer is None else ("char", "a")
            raise UserError(
                f"{path} has {other} meta.pkl, so its tokens are not data.tokenizer={cfg.tokenizer}: set {made}"
            )
        if tokenizer is None:
            tokenizer = _tokenizer(cfg)
            check_vocabulary(path, [train, val], tokenizer)
        return [train], [val], tokenizer, str(path)
    if not path.exists() or path.suffix == ".bin" or any(path.glob("*.bin")):
        return *_shards(str(path), cfg), str(path)
    return *_tokenise([read_text(file) for file in text_files(path)], cfg, str(path)), str(path)


def _binidx_at(path: Path) -> Path | None:
    """FILE of the binidx pair that `path` names, or of the only one in that folder."""
    if not path.is_dir():
        return prefix_of(path)
    indices = sorted(path.glob("*.idx"))
    if len(indices) > 1:
        raise UserError(f"{path} has {len(indices)} .idx files: set data.path to one, such as {indices[0]}")
    return prefix_of(indices[0]) if indices else None


def _binidx(prefix: Path, cfg):
    """(train arrays, val arrays, tokenizer) of a binidx pair, the tail of which is held out."""
    if cfg.tokenizer == "char":
        raise UserError(f"{prefix} is a binidx pair, which holds no characters: set data.tokenizer=world, or what made it")
    tokenizer, tokens_N = _tokenizer(cfg), read_binidx(prefix)
    check_prepared(prefix.parent, tokenizer)
    return *split_tail([tokens_N], cfg.val_fraction), tokenizer


def _shards(path: str, cfg):
    """(train arrays, val arrays, tokenizer) of llm.c shards; without a val shard the tail of the rest is held out."""
    if cfg.tokenizer == "char":
        raise UserError(f"{path} holds llm.c shards, which are no characters: set data.tokenizer=gpt2, or what made them")
    files = find_shards(path)
    train, val = ([read_shard(file) for file in of_split] for of_split in files)
    tokenizer = _tokenizer(cfg)
    check_vocabulary((files[0] + files[1])[0].parent, train + val, tokenizer)
    if not train:
        raise UserError(f"{path} has val shards alone: give the folder or a pattern that has train shards too")
    if not val:
        train, val = split_tail(train, cfg.val_fraction)
    return train, val, tokenizer


def split_tail(arrays: list[np.ndarray], fraction: float) -> tuple[list, list]:
    """Cut the last `fraction` of all tokens off, as nanoGPT does: (head arrays, tail arrays)."""
    keep, head, tail = int(sum(len(a) for a in arrays) * (1 - fraction)), [], []
    for array in arrays:
        head.append(array[:keep])
        tail.append(array[keep:])
        keep = max(keep - len(array), 0)
    return [a for a in head if len(a)], [a for a in tail if len(a)]


def _tokenise(texts: list[str], cfg, what: str):
    """(train arrays, val arrays, tokenizer) of one text, or of the documents of a folder.

    One text is split by characters and then encoded, as nanoGPT's prepare.py scripts do.
    """
    if not any(text.strip() for text in texts):
        raise UserError(f"{what} holds no text: data.path must name a text with words in it")
    if cfg.tokenizer == "char":
        texts = [BETWEEN_TEXTS.join(texts)]
        tokenizer = CharTokenizer("".join(sorted(set(texts[0]))))
        if tokenizer.vocab_size > 1 << 16:
            raise UserError(f"{what} has more than 65,536 distinct characters: set data.tokenizer=gpt2")
    else:
        tokenizer = _tokenizer(cfg)
        if tokenizer.eot is None:
            texts = [BETWEEN_TEXTS.join(texts)]
    dtype = token_dtype(tokenizer.vocab_size)
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - cfg.val_fraction))
        halves = [tokenizer.encode(part).astype(dtype) for part in (texts[0][:cut], texts[0][cut:])]
        return [halves[0]], [halves[1]], tokenizer
    documents = [np.insert(tokenizer.encode(text), 0, tokenizer.eot).astype(dtype) for text in texts]
    return *split_tail([np.concatenate(documents)], cfg.val_fraction), tokenizer


def _tokenizer(cfg):
    return named_tokenizer(cfg.tokenizer, cfg.vocab_path, cfg.download)


def named_tokenizer(name: str, vocab_path: str | None = None, download: bool = True):
    """The tokenizer that data.tokenizer names; characters have none before there is a text."""
    if name == "file":
        return file_tokenizer(vocab_path)
    if name == "world":
        return world_tokenizer(vocab_path)
    return {"gpt2": gpt2_tokenizer, "neox": neox_tokenizer}[name](vocab_path, download)


def text_files(path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The text file `path`, or all texts but empty ones below the folder `path`, in the order of their names."""
    if path.is_file():
        return [path]
    is_text = lambda file: file.suffix.lower() in suffixes and file.is_file() and file.stat().st_size
    files = sorted(filter(is_text, path.rglob("*")))
    if not files:
        raise UserError(f"the folder {path} has no texts ({', '.join(suffixes)}), no shards and no train.bin")
    return files


def read_text(file: Path) -> str:
    """A UTF-8 text file, its line ends as \\n."""
    try:
        if (size := file.stat().st_size) > MAX_TEXT_BYTES:
            raise UserError(f"{file} has {size:,} bytes: make shards of it first, with --mode=prepare")
        return decode(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"could not read {file}: {error.strerror or error}") from error


def decode(raw: bytes, file: Path, offset: int = 0) -> str:
    """UTF-8 bytes that begin at `offset` of `file`, as text with \\n line ends and without a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {offset + error.start:,} is 0x{raw[error.start]:02x}): convert it, "
            "for example with `iconv -f latin1 -t utf-8`"
        ) from error


def _shakespeare(cfg) -> tuple[str, str]:
    """(text, name): $JAXVRAM_DATA/tinyshakespeare.txt, the cache, the network, and where allowed the offline text."""
    folder = os.environ.get("JAXVRAM_DATA")
    for place in ([Path(folder).expanduser()] if folder else []) + [cache_dir()]:
        file = place / "tinyshakespeare.txt"
        if file.is_file():
            if hashlib.sha256(file.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
                raise UserError(f"{file} is not tiny Shakespeare (sha256 differs): remove it, or set data.path={file}")
            return read_text(file), "tiny Shakespeare"
    try:
        if not cfg.download:
            raise UserError(f"there is no {file} and data.download=False; save {SHAKESPEARE_URL} there")
        return read_text(fetch(SHAKESPEARE_URL, file, SHAKESPEARE_SHA256)), "tiny Shakespeare"
    except UserError as error:
        if not cfg.allow_offline:
            raise UserError(f"{error}. Or set data.dataset=offline (a text that every Python has)") from error
        print(
            f"Training on Python's help text instead of tiny Shakespeare: {error}; or set JAXVRAM_DATA to a folder "
            "that holds tinyshakespeare.txt"
        )
        return offline_text(), "Python's help text"


def offline_text() -> str:
    """What every Python has on disk: the language reference behind help(), some 450 kB of prose with examples.

    Typographic signs become ASCII, so that the alphabet stays below 100 characters. Python versions differ a little.
    """
    from pydoc_data.topics import topics

    text = BETWEEN_TEXTS.join(topics[name].strip() for name in sorted(topics))
    text = text.translate(dict(zip(map(ord, "\u2013\u2014\u2018\u2019\u201c\u201d"), "--''\"\"", strict=True)))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def _fineweb(cfg):
    """llm.c shards of FineWeb 10B (classic): one val shard and data.fineweb_shards train shards of 100M tokens."""
    if cfg.tokenizer != "gpt2":
        raise UserError("data.dataset=fineweb holds GPT-2 tokens: set data.tokenizer=gpt2")
    if not 1 <= cfg.fineweb_shards <= FINEWEB_TRAIN_SHARDS:
        raise UserError(f"data.fineweb_shards={cfg.fineweb_shards} must lie in 1..{FINEWEB_TRAIN_SHARDS}")
    folder = cache_dir() / "fineweb10B"
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, cfg.fineweb_shards + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    try:
        if missing and not cfg.download:
            raise UserError(f"{folder} lacks {len(missing)} of {len(names)} FineWeb shards and data.download=False")
        for name in missing:
            sha256 = lfs_sha256(FINEWEB_URL + name)
            print(f"{name}: 200 MB, to be checked against the sha256 that the server states ({sha256[:12]}...)")
            fetch(FINEWEB_URL + name, folder / name, sha256)
    except UserError as error:
        if not cfg.allow_offline:
            raise UserError(
                f"{error}. Without a network: copy {', '.join(missing[:3])} from {FINEWEB_URL} into {folder}, "
                "or set data.path to shards of your own (--mode=prepare)"
            ) from error
        print(f"Training on Python's help text instead of FineWeb ({error}).")
        text = offline_text()
        return *_tokenise([text], cfg, "offline"), "Python's help text"
    train = [read_shard(folder / name) for name in names[1:]]
    return train, [read_shard(folder / names[0])], _tokenizer(cfg), "FineWeb 10B (classic)"
