"""How a conversation becomes tokens: Stanford Alpaca's two templates, Llama 2's and 3's, ChatML, a plain one for any model.

A style is a function of messages; if the last of them is a user's, what it makes ends where the response begins. Responses
and prompts are encoded apart, so that a prompt has the same tokens in training and when a model is asked.
Facts from: stanford_alpaca train.py; meta-llama/llama generation.py and the templates in Meta's tokenizer_config.json of
Llama 2 and 3; SmolLM2's for ChatML.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxvram.data.file_tokenizers import without_dummy_space
from jaxvram.errors import UserError

ROLES = ("system", "user", "assistant")
BOS, EOS = "bos", "eos"  # the tokenizer's own, whatever their names
TASK = "Below is an instruction that describes a task"
INPUT = ", paired with an input that provides further context"
REQUEST = "Write a response that appropriately completes the request."


class Message(NamedTuple):
    role: str  # one of ROLES
    content: str
    input: str = ""  # of a user whose content is an instruction: what to apply it to (Alpaca)

    @property
    def whole(self) -> str:
        """For styles that have no place of its own for an input."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


class Segment(NamedTuple):
    text: str  # of a special token: its name
    is_special: bool = False
    is_response: bool = False


class Style(NamedTuple):
    segments_of: Callable[[list[Message]], list[Segment]]
    needs: tuple[str, ...]  # special tokens
    end: str  # of them, the one that ends a response
    several_turns: bool = True


def _special(name: str, is_response: bool = False) -> Segment:
    return Segment(name, True, is_response)


def _response(text: str, end: str) -> list[Segment]:
    return [Segment(text, is_response=True), _special(end, is_response=True)]


def _split_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """(system prompt or "", the turns)."""
    has_system = messages[0].role == "system"
    return messages[0].content if has_system else "", messages[has_system:]


def _alpaca(messages: list[Message]) -> list[Segment]:
    """A system prompt, which Alpaca has none of, takes the place of the line about the task."""
    system, turns = _split_system(messages)
    if len(turns) > 2:
        raise UserError(
            f"the alpaca style holds one instruction and one response, not {len(turns)} turns: set data.prompt_style=plain, "
            "or that of the model"
        )
    user = turns[0]
    head = system or f"{TASK}{INPUT if user.input else ''}. {REQUEST}"
    given = f"\n\n### Input:\n{user.input}" if user.input else ""
    segments = [_special(BOS), Segment(f"{head}\n\n### Instruction:\n{user.content}{given}\n\n### Response:")]
    return segments + [s for answer in turns[1:] for s in _response(answer.content, EOS)]


def _plain(messages: list[Message]) -> list[Segment]:
    system, turns = _split_system(messages)
    segments, head = [_special(BOS)], f"{system}\n\n" if system else ""
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(f"{head}User:\n{turn.whole}\n\nAssistant:\n"))
            head = ""
        else:
            segments += _response(turn.content, EOS)
    return segments


def _llama2(messages: list[Message]) -> list[Segment]:
    system, turns = _split_system(messages)
    segments, head = [], f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for turn in turns:
        if turn.role == "user":
            segments += [_special("<s>"), Segment(f"[INST] {(head + turn.whole).strip()} [/INST]")]
            head = ""
        else:
            segments += _response(f" {turn.content.strip()} ", "</s>")
    return segments


def _chatml(messages: list[Message]) -> list[Segment]:
    segments = []
    for message in messages:
        segments.append(_special("<|im_start|>"))
        if message.role == "assistant":
            segments += [Segment("assistant\n"), *_response(message.content, "<|im_end|>")]
        else:
            segments += [Segment(f"{message.role}\n{message.whole}"), _special("<|im_end|>")]
        segments.append(Segment("\n"))
    if messages[-1].role == "assistant":
        return segments
    return [*segments, _special("<|im_start|>"), Segment("assistant\n")]


def _llama3(messages: list[Message]) -> list[Segment]:
    head = lambda role: [_special("<|start_header_id|>"), Segment(role), _special("<|end_header_id|>")]
    segments = [_special("<|begin_of_text|>")]
    for message in messages:
        segments += head(message.role)
        if message.role == "assistant":
            segments += [Segment("\n\n"), *_response(message.content.strip(), "<|eot_id|>")]
        else:
            segments += [Segment(f"\n\n{message.whole.strip()}"), _special("<|eot_id|>")]
    return segments if messages[-1].role == "assistant" else [*segments, *head("assistant"), Segment("\n\n")]


STYLES = {
    "alpaca": Style(_alpaca, (EOS,), EOS, several_turns=False),
    "llama2": Style(_llama2, ("<s>", "</s>"), "</s>"),
    "chatml": Style(_chatml, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Style(
        _llama3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "plain": Style(_plain, (EOS,), EOS),
}


def segments_of(style: str, system: str, messages: Iterable[Message]) -> list[Segment]:
    """A conversation as `style` has it; `system` is of those that have no system prompt of their own."""
    messages = list(messages)
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return [s for s in STYLES[style].segments_of(messages) if s.text]


def check_style(style: str, tokenizer) -> None:
    """Raises a UserError that names styles that would do, unless the tokenizer has all special tokens of `style`."""
    lacks = lambda name: [token for token in STYLES[name].needs if special_id(tokenizer, token) is None]
    if missing := lacks(style):
        named = ", ".join("an id that ends a text" if token == EOS else token for token in missing)
        others = ", ".join(name for name in STYLES if not lacks(name))
        way_out = f"set data.prompt_style to one of: {others}" if others else "take another tokenizer"
        raise UserError(f"data.prompt_style={style} needs {named}, which {tokenizer.name} lacks: {way_out}")


def special_id(tokenizer, token: str) -> int | None:
    """The id of a special token. GPT-2's tokenizer has one id for both ends of a text."""
    if token == EOS:
        return getattr(tokenizer, "eos", tokenizer.eot)
    find = getattr(tokenizer, "special", lambda _: None)
    if token == BOS:
        bos = getattr(tokenizer, "bos", tokenizer.eot)
        return None if bos == find("<|im_start|>") else bos  # so SmolLM2's files call it; no text begins with it
    return find(token)


def end_ids(style: str, tokenizer) -> list[int]:
    """The ids at which a response is over."""
    return sorted({i for token in (STYLES[style].end, EOS) if (i := special_id(tokenizer, token)) is not None})


def encode(segments: list[Segment], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 (N,), is_response bool (N,)); text after a special token is encoded as at the start of a text."""
    pieces, goes_on = [np.zeros(0, np.int32)], False
    flags = [np.zeros(0, bool)]
    for segment in segments:
        if segment.is_special:
            i = special_id(tokenizer, segment.text)
            ids_N = np.array([] if i is None else [i], np.int32)
            goes_on &= i is None
        else:
            ids_N = _continued(tokenizer, segment.text) if goes_on else tokenizer.encode(segment.text)
            goes_on = True
        pieces.append(ids_N)
        flags.append(np.full(len(ids_N), segment.is_response))
    return np.concatenate(pieces), np.concatenate(flags)


def _continued(tokenizer, text: str) -> np.ndarray:
    """The ids of a text that goes on from another: as after a line break, where no tokenizer adds a space."""
    break_N, whole_N = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    if np.array_equal(whole_N[: len(break_N)], break_N):
        return whole_N[len(break_N) :]
    return without_dummy_space(tokenizer, tokenizer.encode(text))  # `text` begins with spaces that join the break
