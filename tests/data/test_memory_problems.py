"""Selective copying, induction and recall: what is asked, what is the answer, and that exams may be longer than lessons."""

import itertools

import numpy as np
import pytest

from jaxvram.data import DataConfig, load
from jaxvram.errors import UserError


def source(name, block_size, **fields):
    return load(DataConfig(name=name, **fields), block_size, seed=1)


def test_selective_copying():
    problems = source("copying", 20 + 4, length=20, symbols=5, remembered=4)
    batch = problems.batch("train", 0, 100)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == targets.shape == (100, 24) and problems.vocab_size == 7
    assert (targets[:, :20] == -1).all() and (tokens[:, 20] == 6).all()
    for row, wanted in zip(tokens, targets[:, 20:], strict=True):
        assert (row[:20][row[:20] != 5] == wanted).all() and (row[21:] == wanted[:-1]).all()
    places = np.nonzero(tokens[:, :20] != 5)[1]
    assert set(places) == set(range(20)), "every place is used"


def test_induction():
    problems = source("induction", 16, length=16, symbols=5)
    batch = problems.batch("train", 0, 300)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == (300, 16) and (targets[:, :-1] == -1).all() and (tokens[:, -1] == 5).all()
    assert ((tokens == 5).sum(1) == 2).all()
    first = (tokens == 5).argmax(1)
    assert set(first) == set(range(14)), "every place is used"
    assert (targets[:, -1] == tokens[np.arange(300), first + 1]).all() and (targets[:, -1] < 5).all()


def pairs_of(row, symbols):
    """Every (key, value) that stands in a row."""
    return [(int(k), int(v)) for k, v in itertools.pairwise(row) if k < symbols <= v < 2 * symbols]


def test_recall():
    problems = source("recall", 24, length=24, symbols=7, remembered=4)
    batch = problems.batch("train", 0, 300)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == targets.shape == (300, 24) and problems.vocab_size == 15
    assert (tokens[:, :8:2] < 7).all() and (targets[:, :8] == -1).all() and ((targets >= 0).sum(1) == 4).all()
    orders = set()
    for row, wanted in zip(tokens, targets, strict=True):
        told = dict(pairs_of(row[:8], 7))
        asked = np.nonzero(wanted >= 0)[0]
        assert len(told) == 4 and {int(row[t]) for t in asked} == set(told), "each key is asked for once"
        assert all(wanted[t] == told[int(row[t])] for t in asked)
        assert all(row[t + 1] == wanted[t] for t in asked if t < 23), "what follows a key is its value"
        rest = np.delete(np.arange(8, 24), [t - 8 for t in (*asked, *asked + 1) if t < 24])
        assert (row[rest] == 14).all()
        orders.add(tuple(list(told).index(int(row[t])) for t in asked))
    assert len(orders) == 24 and set(np.nonzero(targets >= 0)[1]) == set(range(8, 24)), "every order, every place"
    assert set(targets[targets >= 0]) == set(range(7, 14))
    assert problems.tokenizer.decode([0, 7, 14]) == "aA."


def test_recall_back_to_back():
    problems = source("recall", 15, length=15, symbols=9, remembered=4)
    batch = problems.batch("train", 0, 5)
    assert (batch["targets"][:, 8::2] >= 9).all() and (batch["targets"][:, 9::2] == -1).all()
    assert (batch["tokens"] < 18).all()


def test_exam_of_recall():
    problems = source("recall", 24, length=24, exam_length=60, symbols=7, remembered=4)
    exam, again, of_training = problems.exam("val", 30), problems.exam("val", 30), problems.exam("train", 30)
    assert exam["tokens"].shape == exam["targets"].shape == (30, 60)
    assert (exam["tokens"] == again["tokens"]).all() and (exam["targets"] == again["targets"]).all()
    rows = lambda batch: {bytes(row) for row in batch["tokens"]}
    assert not rows(exam) & rows(of_training)
    short = source("recall", 24, length=24, symbols=7, remembered=4)
    assert not rows(short.batch("val", 0, 200)) & rows(short.batch("train", 0, 200))
    other_seed = load(DataConfig(name="recall", length=24, symbols=7, remembered=4), 24, seed=2)
    assert (other_seed.exam("val", 9)["tokens"] == short.exam("val", 9)["tokens"]).all(), "one exam for all seeds"
    assert (other_seed.batch("train", 0, 9)["tokens"] != short.batch("train", 0, 9)["tokens"]).any()


@pytest.mark.parametrize(("name", "block_size"), [("copying", 20 + 4), ("induction", 20)])
def test_exams(name, block_size):
    problems = source(name, block_size, length=20, exam_length=50, symbols=5, remembered=4)
    questions, answers = problems.problems("val", 7)
    assert questions.shape == (7, 50 + (name == "copying")) and answers.shape == (7, 4 if name == "copying" else 1)
    again, _ = problems.problems("val", 7)
    assert (questions == again).all()
    assert (questions != problems.problems("train", 7)[0]).any()
    assert problems.tokenizer.decode(questions[0][-1:]) == ">"


@pytest.mark.parametrize(("name", "block_size"), [("copying", 20 + 4), ("induction", 20), ("recall", 20)])
def test_a_batch_is_a_function_of_n_and_rows(name, block_size):
    fields = {"length": 20, "symbols": 5, "remembered": 4}
    whole = source(name, block_size, **fields).batch("train", 3, 64)
    part = source(name, block_size, **fields).batch("train", 3, 64, rows=slice(8, 24))
    assert all((whole[k][8:24] == part[k]).all() for k in whole)
    assert any((whole[k] != source(name, block_size, **fields).batch("train", 4, 64)[k]).any() for k in whole)


@pytest.mark.parametrize(("name", "fields", "message"), [
    ("copying", {"remembered": 30}, r"data.remembered=30 must lie in 1..data.length=20"),
    ("copying", {"symbols": 1}, "data.symbols=1 must lie in 2..52"),
    ("induction", {"length": 3}, "data.length=3 must be at least 4"),
    ("induction", {"exam_length": 2}, "must be at least 4"),
    ("recall", {"symbols": 1}, "data.symbols=1 must lie in 2"),
    ("recall", {"remembered": 6, "symbols": 30}, r"data.remembered=6 pairs need .* 4 tokens each"),
    ("recall", {"remembered": 5, "symbols": 4}, r"data.remembered=5 pairs need as many keys"),
    ("induction", {"order": "shuffled"}, "the induction problem draws them"),
])  # fmt: skip
def test_impossible_settings(name, fields, message):
    with pytest.raises(UserError, match=message):
        source(name, 20, **{"length": 20, **fields})


def test_the_models_context_is_the_sequences():
    with pytest.raises(UserError, match=r"model.block_size=20 does not fit the copying problem: set it to 36"):
        source("copying", 20, length=20)
