import numpy as np
import pytest

from jaxvram.data import DataConfig, load
from jaxvram.data.problems import SortProblems, torch_randperm


def sort(**fields):
    cfg = DataConfig(name="sort", **fields)
    return load(cfg, 2 * cfg.length - 1, seed=1)


def adder(**fields):
    cfg = DataConfig(name="adder", **fields)
    return load(cfg, 3 * cfg.ndigit, seed=1)


def test_sort_rows():
    source = sort()
    assert source.vocab_size == 3 and source.tokenizer.decode([0, 2, 1]) == "021"
    for split in ("train", "val"):
        batch = source.batch(split, 0, 200)
        tokens, targets = batch["tokens"], batch["targets"]
        assert tokens.shape == (200, 11) and tokens.dtype == targets.dtype == np.int32
        assert (targets[:, :5] == -1).all()
        assert (targets[:, 5:] == np.sort(tokens[:, :6], axis=1)).all()
        assert (tokens[:, 6:] == targets[:, 5:-1]).all()
        held_out = source.held_out(tokens[:, :6])
        assert (held_out == (split == "val")).all()


def test_sort_holds_out_a_quarter_of_all_questions_for_good():
    source = sort()
    questions = np.stack(np.meshgrid(*[np.arange(3)] * 6), axis=-1).reshape(-1, 6)
    held_out = source.held_out(questions)
    assert 0.2 < held_out.mean() < 0.3
    assert held_out.sum() == 167  # for good: a change here invalidates every trained checkpoint's score
    seen = {tuple(q) for n in range(40) for q in source.batch("train", n, 200)["tokens"][:, :6].tolist()}
    assert seen == {tuple(q) for q in questions[~held_out].tolist()}


@pytest.mark.parametrize("digits", range(2, 11))
def test_the_smallest_sort_problems_have_questions_on_both_sides(digits):
    source = sort(length=2, digits=digits)
    assert source.problems("train", 5)[0].shape == source.problems("val", 5)[0].shape == (5, 2)


def test_sort_throws_back_half_of_the_draws_without_repeats():
    source = sort(length=4, digits=10)
    questions = np.concatenate([source.batch("train", n, 500)["tokens"][:, :4] for n in range(20)])
    many = np.array([len(set(q)) > 2 for q in questions.tolist()]).mean()
    # of 10^4 draws 5040 have four distinct digits and 4320 three: p = .936 unrejected, .936 / (.936 + 2 * .064) kept
    assert abs(many - 0.936 / (0.936 + 2 * 0.064)) < 0.02


def test_sort_is_a_function_of_n_and_rows():
    source = sort()
    whole = source.batch("train", 3, 64)
    part = sort().batch("train", 3, 64, rows=slice(8, 24))
    assert all((whole[k][8:24] == part[k]).all() for k in whole)
    assert (whole["tokens"] != source.batch("train", 4, 64)["tokens"]).any()
    assert (whole["tokens"] != SortProblems(6, 3, seed=2).batch("train", 3, 64)["tokens"]).any()
    questions, answers = source.problems("val", 1000)
    assert questions.shape == answers.shape == (1000, 6) and source.held_out(questions).all()
    assert (np.sort(questions, axis=1) == answers).all()


def test_randperm_is_torchs():
    assert torch_randperm(10_000, 1337)[:8].tolist() == [7415, 7727, 8828, 1002, 2307, 598, 5379, 8217]
    torch = pytest.importorskip("torch")
    for count in (100, 10_000):
        theirs = torch.randperm(count, generator=torch.Generator().manual_seed(1337))
        assert torch_randperm(count, 1337).tolist() == theirs.tolist()


def numbers(source, questions, answers):
    digits = source.ndigit
    a, b = (questions[:, i : i + digits] @ 10 ** np.arange(digits)[::-1] for i in (0, digits))
    return a, b, answers @ 10 ** np.arange(digits + 1)


@pytest.mark.parametrize(("ndigit", "train", "val"), [(1, 80, 20), (2, 9500, 500)])
def test_adder_questions(ndigit, train, val):
    source = adder(ndigit=ndigit)
    asked = []
    for split, count in (("train", train), ("val", val)):
        questions, answers = source.problems(split, 10**6)
        assert questions.shape == (count, 2 * ndigit) and answers.shape == (count, ndigit + 1)
        a, b, total = numbers(source, questions, answers)
        assert (a + b == total).all()
        asked.append({*(a * 10**ndigit + b).tolist()})
    assert len(asked[0] | asked[1]) == 100**ndigit and not asked[0] & asked[1]
    assert [len(x) for x in source.problems("val", 3)] == [3, 3]


def test_adder_holds_out_what_mingpt_does():
    assert adder().problems("val", 3)[0].tolist() == [[7, 4, 1, 5], [7, 7, 2, 7], [8, 8, 2, 8]]


def test_adder_rows_learn_only_the_answer():
    source = adder()
    batch = source.batch("train", 0, 100)
    assert batch["tokens"].shape == (100, 6) and (batch["targets"][:, :3] == -1).all()
    a, b, total = numbers(source, batch["tokens"][:, :4], batch["targets"][:, 3:])
    assert (a + b == total).all() and (batch["tokens"][:, 4:] == batch["targets"][:, 3:5]).all()


def test_adder_orders():
    rows = lambda source, split, batches, size: np.concatenate(
        [source.batch(split, n, size)["tokens"][:, :4] for n in range(batches)]
    )
    shuffled = rows(adder(order="shuffled"), "train", 19, 500)
    assert len({*map(tuple, shuffled.tolist())}) == 9500  # every question once an epoch
    drawn = rows(adder(), "train", 19, 500)
    assert 0.55 < len({*map(tuple, drawn.tolist())}) / 9500 < 0.7  # with replacement: 1 - 1/e
    val = rows(adder(), "val", 5, 100)
    assert (val == adder().problems("val", 500)[0]).all()  # in order: five batches are the whole exam
