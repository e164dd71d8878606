"""Where batches come from. A source is a pure function of (seed, split, n): nothing to save, nothing to resume.

A source of text has `vocab_size`, `tokenizer`, `sequence_length` (T), `example_size` (numbers), `description` (one line) and
`batch(split, n, batch_size, rows=slice(None)) -> {"tokens": int32 (B, T), "targets": int32 (B, T)}`, where a target of
-1 is not learnt, and only `rows` of the batch are made. Problems also have
`problems(split, limit) -> (prompts (N, P), answers (N, A))`, which a model answers by generating, or, where a row asks many
times, `exam(split, limit)`: a batch that is read at once, each target a question. Instructions also have
`prompt_ids(message) -> int32 (P,)`, `until_end(ids) -> ids` (the answer among what a model went on with), and in a batch,
where examples are packed, "segments": int32 (B, T), by which tokens of one example are told from those of another; 0 is
padding.
"""

import dataclasses

from jaxvram.data.instructions import load_instructions
from jaxvram.data.memory_problems import AssociativeRecall, InductionHeads, SelectiveCopying
from jaxvram.data.order import ORDERS
from jaxvram.data.problems import AdderProblems, SortProblems
from jaxvram.data.text import load_text
from jaxvram.errors import UserError, nearest

NAMES = ("text", "instructions", "sort", "adder", "copying", "induction", "recall")
DATASETS = ("shakespeare", "fineweb", "offline")
TOKENIZERS = ("char", "gpt2", "neox", "world", "file")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # text | instructions | sort | adder (minGPT's two problems) | copying | induction (Mamba's two) | recall (Zoology's)
    name: str = "text"
    dataset: str = "shakespeare"  # shakespeare | fineweb (llm.c shards) | offline (of every Python: text, instructions)
    path: str | None = None  # instead: text, folder of texts, nanoGPT's folder, llm.c's shards, binidx pair; JSON
    tokenizer: str = "char"  # char | gpt2 | neox (GPT-NeoX's: Mamba, Pythia) | world (RWKV's) | file (vocab_path's)
    # gpt2: folder with encoder.json or vocab.json; neox: tokenizer.json or its folder; None: found or downloaded.
    # world: rwkv_vocab_v20230424.txt or its folder; None: that of the rwkv package
    # file: a tokenizer.json, tokenizer.model or .gguf, or a folder with one of them
    vocab_path: str | None = None
    val_fraction: float = 0.1  # of a text without a val split of its own: its tail; of instructions: drawn
    order: str = "random"  # random (with replacement, as nanoGPT) | shuffled (every window once an epoch) | magic_prime
    # magic_prime: RWKV's authors' order of the windows of one text; with val_fraction=0 what it leaves over is held out
    download: bool = True  # may ask the network for what is not on this machine
    allow_offline: bool = False  # if even that fails, train on the offline text and say so
    fineweb_shards: int = 1  # train shards of FineWeb, of 100M tokens and 200 MB each, up to 103
    prompt_style: str = "alpaca"  # instructions: alpaca | llama2 | chatml | llama3 | plain (several turns, any model)
    system: str = ""  # instructions: the system prompt of conversations that have none; empty: none
    loss_on: str = "responses"  # instructions: responses | all (prompts are learnt too)
    pack: bool = True  # instructions: several examples a row, of which none sees another; False: one, padded
    length: int = 6  # sort: digits in a question; copying, induction, recall: tokens
    exam_length: int = 0  # copying, induction, recall: of the problems that are scored; 0: the same
    symbols: int = 16  # copying, induction: kinds of token to remember; recall: keys, and as many values
    remembered: int = 16  # copying: tokens to tell again; recall: pairs
    digits: int = 3  # sort: digits there are
    ndigit: int = 2  # adder: digits of each number


def load(cfg: DataConfig, block_size: int, seed: int):
    """The source that `cfg` describes, for a model with a context of `block_size` tokens.

    Raises:
      UserError: whatever is wrong with the configuration, the files or the network, and how to put it right.
    """
    for field, options in (("name", NAMES), ("dataset", DATASETS), ("tokenizer", TOKENIZERS), ("order", ORDERS)):
        if (value := getattr(cfg, field)) not in options:
            raise UserError(f"data.{field}={value!r} is unknown{nearest(value, options)}")
    if not 0 < cfg.val_fraction < 1 and (cfg.order != "magic_prime" or cfg.val_fraction != 0):
        raise UserError(f"data.val_fraction={cfg.val_fraction} must lie between 0 and 1")
    if cfg.order == "magic_prime" and cfg.name != "text":
        raise UserError(f"data.order=magic_prime is for data.name=text: set data.order=shuffled for {cfg.name}, or random")
    if cfg.name == "text":
        return load_text(cfg, block_size, seed)
    if cfg.name == "instructions":
        return load_instructions(cfg, block_size, seed)
    if cfg.path is not None:
        raise UserError(f"data.path={cfg.path} is for data.name=text; data.name={cfg.name} makes its own problems")
    if cfg.name != "adder" and cfg.order != "random":
        raise UserError(
            f"data.order=shuffled needs a list of examples; the {cfg.name} problem draws them: set data.order=random"
        )
    source = {
        "sort": lambda: SortProblems(cfg.length, cfg.digits, seed),
        "adder": lambda: AdderProblems(cfg.ndigit, cfg.order, seed),
        "copying": lambda: SelectiveCopying(cfg.length, cfg.exam_length, cfg.symbols, cfg.remembered, seed),
        "induction": lambda: InductionHeads(cfg.length, cfg.exam_length, cfg.symbols, seed),
        "recall": lambda: AssociativeRecall(cfg.length, cfg.exam_length, cfg.symbols, cfg.remembered, seed),
    }[cfg.name]()
    if block_size != source.sequence_length:
        raise UserError(
            f"model.block_size={block_size} does not fit the {cfg.name} problem: set it to {source.sequence_length}"
        )
    return source
