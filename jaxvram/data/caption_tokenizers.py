"""Captions to token ids as text encoders read them: bytes, CLIP's byte pairs, T5's SentencePiece.

Each has `length` (S), `identity` and `encode(captions) -> (int32 (N, S), int32 (N,))`, the second how many tokens of each
caption count. A caption of more than S tokens is an error and never cut. What looks like a special token is text.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from jaxvram.data.file_tokenizers import keep_apart
from jaxvram.errors import UserError

BEGIN, END, PAD = 256, 257, 258  # behind the 256 bytes
CLIP_SPECIALS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
T5_SPECIALS = {"eos": "</s>", "pad": "<pad>"}
# How CLIP cuts a text, in lower case, before it pairs bytes
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SHOWN = 60  # characters of a caption in a message


class ByteTokens:
    """A caption as the bytes of its UTF-8, with a mark before and behind: needs no vocabulary file."""

    vocab_size, identity = 259, "bytes"

    def __init__(self, length: int):
        if length < 2:
            raise UserError(f"context_length={length} leaves no room: a caption's two marks take 2")
        self.length = length

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [[BEGIN, *caption.encode("utf-8", "replace"), END] for caption in captions]
        return padded(rows, captions, self.length, PAD)


class CLIPTokens:
    """Byte pairs of a text in lower case with its white space tidied, between a mark of its start and one of its end.

    Every one of the S positions counts: Stable Diffusion's U-Net reads them all. The folder says what stands behind the
    end: once more its mark, or "!" (Stable Diffusion 2).
    """

    def __init__(self, folder: Path, length: int, vocab_size: int):
        self.length = length
        self._tokenizer, self.identity = _byte_pairs(folder)
        self._special = _special_ids(folder, CLIP_SPECIALS, self._tokenizer.token_to_id)
        _check_vocabulary(folder, self._tokenizer.get_vocab_size(), vocab_size)
        self.identity += f", padded with {self._special['pad']}"

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [self._tokenizer.encode(caption, add_special_tokens=False).ids for caption in captions]
        rows = [[self._special["bos"], *row, self._special["eos"]] for row in ids]
        tokens_NxS, _ = padded(rows, captions, self.length, self._special["pad"])
        return tokens_NxS, np.full(len(captions), self.length, np.int32)


class T5Tokens:
    """SentencePiece's pieces, and a mark behind them; captions are neither put in lower case nor rid of links."""

    def __init__(self, folder: Path, length: int, vocab_size: int):
        self.length = length
        if (file := folder / "spiece.model").is_file():
            self._encode, id_of, size = _sentence_pieces(file)
        elif (file := folder / "tokenizer.json").is_file():
            tokenizer = _tokenizer_json(file)
            self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
            id_of, size = tokenizer.token_to_id, tokenizer.get_vocab_size()
        else:
            raise UserError(f"{folder} has no tokenizer: T5's is spiece.model, or tokenizer.json; put it beside the weights")
        self.identity = _digest(file)
        self._special = _special_ids(folder, T5_SPECIALS, id_of)
        _check_vocabulary(folder, size, vocab_size)

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [[*self._encode(caption), self._special["eos"]] for caption in captions]
        return padded(rows, captions, self.length, self._special["pad"])


def padded(rows: list[list[int]], captions: list[str], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids in one array, int32 (N, S), and their lengths. UserError: one is longer than S."""
    tokens_NxS = np.full((len(rows), length), pad, np.int32)
    for tokens_S, row, caption in zip(tokens_NxS, rows, captions, strict=True):
        if len(row) > length:
            shown = caption if len(caption) <= SHOWN else caption[: SHOWN - 3] + "..."
            raise UserError(
                f"the caption {shown!r} takes {len(row)} tokens, and the text encoder reads {length}: shorten it (captions "
                "are never cut), or choose a longer context_length where the encoder has one"
            )
        tokens_S[: len(row)] = row
    return tokens_NxS, np.array([len(row) for row in rows], np.int32)


def _byte_pairs(folder: Path):
    """(a `tokenizers.Tokenizer` of CLIP's, what tells it from another)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    if (file := folder / "tokenizer.json").is_file():
        return _tokenizer_json(file), _digest(file)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.is_file() or not merges.is_file():
        files = "tokenizer.json, or vocab.json and merges.txt"
        raise UserError(f"{folder} has no tokenizer: CLIP's is {files}; put it beside the weights or in tokenizer/")
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        id_of = json.loads(vocab.read_text(encoding="utf-8"))
        unknown = CLIP_SPECIALS["eos"]
        tokenizer = Tokenizer(models.BPE(id_of, pairs, end_of_word_suffix="</w>", unk_token=unknown))
    except Exception as error:  # the library raises nothing narrower
        raise _damaged(vocab, error) from error
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    return tokenizer, _digest(vocab, merges)


def _tokenizer_json(file: Path):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise _damaged(file, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # that is: as the text they are
    keep_apart(tokenizer, [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special])
    return tokenizer


def _sentence_pieces(file: Path):
    """(text -> ids, token -> id or None, how many tokens)."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, ValueError) as error:
        raise _damaged(file, error) from error
    id_of = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    return processor.encode, id_of.get, len(id_of)


def _special_ids(folder: Path, usual: dict[str, str], id_of) -> dict[str, int]:
    """The ids of the tokens that mark a caption's ends, by the folder's own names for them where it has any."""
    named = dict(usual)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            for of in usual:
                token = content.get(f"{of}_token")
                token = token.get("content") if isinstance(token, dict) else token
                named[of] = token if isinstance(token, str) else named[of]
        except (ValueError, AttributeError) as error:
            raise _damaged(folder / name, error) from error
    ids = {of: id_of(token) for of, token in named.items()}
    if lacking := [named[of] for of, i in ids.items() if i is None]:
        raise UserError(f"the tokenizer in {folder} has no token {lacking[0]!r}: it is not this text encoder's")
    return ids


def _check_vocabulary(folder: Path, size: int, vocab_size: int):
    if size > vocab_size:
        raise UserError(f"the tokenizer in {folder} has {size:,} tokens, the text encoder {vocab_size:,}: not its own")


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged or no tokenizer ({f'{type(error).__name__}: {error}'[:120]}): fetch it again")
