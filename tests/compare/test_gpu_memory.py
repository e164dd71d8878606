"""The script that holds plans against a card: its minutes, its rows, what follows from them. No card is needed."""

import json
import pathlib
import sys
import time

import pytest

from jaxvram.compare import sides
from jaxvram.vram import cards, nvidia_smi

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
RTX4070 = cards.find("rtx4070")
GIB = 2**30


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_memory

        path = sys.path.copy()
        yield gpu_memory
        sys.path[:] = path


def record(planned=2.0, measured=2.5, outside=0.5, init=1.0, **torch_sides):
    """As --mode=compare --measure writes it, GiB."""
    size = lambda gib: None if gib is None else round(gib * GIB)
    ours = {"peak_bytes": size(measured), "outside_bytes": size(outside), "per_second": 300.0, "seconds_per_step": 1.0}
    ours["peaks"] = {"compile": GIB, "init": size(init), "steps": size(measured)}
    side = lambda gib, rate: {"peak_bytes": size(gib), "per_second": rate, "seconds_per_step": 300 / rate}
    theirs = {name: side(*x) if isinstance(x, tuple) else {"refused": x} for name, x in torch_sides.items()}
    return {
        "unit": "tokens", "planned_bytes": size(planned), "capacity_bytes": RTX4070.capacity_bytes,
        "usable_bytes": RTX4070.usable_bytes, "memory_fraction": 0.92, "versions": {"jax": "1"},
        "step": {"batch_size": 16, "microbatch_size": 8, "tokens": 1024}, "sides": {sides.OURS: ours} | theirs,
    }  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_no_row_is_begun_that_would_not_end(script):
    """100 s are there; rows of 20, 30, 5 and 30 leave 15, where another like the longest does not fit."""
    clock, asked = Clock(), []
    takes = {"a": 20, "b": 30, "c": 5, "d": 30, "e": 1}

    def measure(name, left):
        asked.append((name, left))
        clock.now += takes[name]
        return {"failed": "why"} if name == "b" else {}

    done = list(script.rows(list(takes), 100.0, measure, clock))
    assert asked == [("a", 100.0), ("b", 80.0), ("c", 50.0), ("d", 45.0)]
    assert [name for name, _ in done] == ["a", "b", "c", "d"]
    assert done[1][1] == {"failed": "why", "seconds": 30.0}  # and the others went on
    assert list(script.rows(["a"], 0.0, measure, clock)) == []


def test_the_most_telling_recipes_come_first(script):
    found = script.recipes()
    ordered = script.in_order(found)
    assert sorted(ordered) == sorted(found) and ordered[: len(script.FIRST)] == list(script.FIRST)
    assert {name.partition(":")[0] for name in ordered[:5]} == {"gpt2", "llama_qlora", "dit", "mamba2"}


@pytest.mark.parametrize(
    ("recipe", "override"), [("gpt2:124m", ["--config.train.batch_size=16"]), ("gpt2:xl", []), ("dit:l2", [])]
)
def test_a_step_of_two_microbatches(script, recipe, override):
    assert script._smaller(recipe) == override


def test_the_reserve_that_follows(script):
    kept = round(0.08 * RTX4070.capacity_bytes)
    assert script.reserve(record()) == {
        "beyond": GIB // 2, "outside": GIB // 2, "in_use": RTX4070.reserved_bytes, "follows": kept + GIB // 2,
    }  # fmt: skip
    # A context larger than what JAX leaves alone counts itself; a plan that was too careful gives nothing back.
    assert script.reserve(record(measured=1.5, outside=1.25))["follows"] == 5 * GIB // 4
    assert script.reserve(record(outside=None))["follows"] is None


def test_the_table_and_the_verdict(script):
    unplanned = record(outside=None) | {"planned_refused": "no compiler"}
    del unplanned["planned_bytes"]
    records = {
        "gpt2:124m": record(eager=(10, 100.0), flash=(5, 200.0), compile="no compiler"),
        "dit:b2": record(measured=1.9, init=1.9),
        "gpt2:xl": {"failed": "out of memory: x"},
        "mamba:130m": unplanned,
    }
    said = script.table(records).splitlines()
    assert len({line.count("|") for line in said}) == 1  # as many cells everywhere
    leanest_and_fastest = "5.00 (flash) | 0.50 | 300 tokens | 1.50 |"
    assert said[2] == f"| `gpt2:124m` | 8 x 1024 | 2.00 | 2.50 | 1.250 | 0.50 | 1.43 | {leanest_and_fastest}"
    assert "| at most 1.90 | 0.950 |" in said[3] and "out of memory: x" in said[4] and "| 2.50 | - | - | - |" in said[5]
    said = script.verdict(records)
    assert "off by +25.0% at the most (gpt2:124m)" in said
    assert "Reserve in use 0.93 GiB; it would be 1.43 (gpt2:124m: +0.50 beyond the plan)" in said
    assert "up to 0.50, for which CONTEXT_BYTES allows 0.60" in said
    assert "nothing can be said" in script.verdict({"gpt2:xl": records["gpt2:xl"]})
    assert "no reserve follows" in script.verdict({"a": record(outside=None)})


FAKE = """
import json, pathlib, subprocess, sys, time
folder, recipe = sys.argv[1:3]
if recipe == "gpt2:xl":
    sys.exit("JAX: measured compiling\\nerror: jaxvram's side: out of memory: 9 GiB\\n")
if recipe == "dit:b2":  # and what it started
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2); open(%r, 'w')"])
pathlib.Path(folder, "compare_measured.json").write_text(json.dumps(%r))
"""


@pytest.fixture
def launch(script, monkeypatch, tmp_path):
    """In place of launch.py: gpt2:xl does not fit, dit:b2 takes two seconds in a process of its own, the rest is quick."""
    (tmp_path / "fake.py").write_text(FAKE % (str(tmp_path / "survived"), record(eager=(10, 100.0))))
    asked = []

    def command(recipe, folder, torch_python, *options):
        asked.append((recipe, torch_python, options))
        return [sys.executable, str(tmp_path / "fake.py"), folder, recipe]

    monkeypatch.setattr(script, "command", command)
    return asked


def test_a_row_that_fails_says_why_and_one_that_takes_too_long_leaves_nothing_behind(script, launch, tmp_path):
    assert script.measure("gpt2:xl", 60.0) == {"failed": "jaxvram's side: out of memory: 9 GiB"}
    assert script.measure("gpt2:124m", 60.0, "/other/python") == record(eager=(10, 100.0))
    assert launch[-1] == ("gpt2:124m", "/other/python", ("--measure", "--config.train.batch_size=16"))
    began = time.monotonic()
    assert script.measure("dit:b2", 1.0)["failed"] == "not done in the 1 s that were left"
    assert time.monotonic() - began < 1.9
    time.sleep(2.5)
    assert not (tmp_path / "survived").exists()


def test_rows_are_kept_as_they_come(script, launch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("jaxvram.compare.measured.on_gpu", lambda: True)
    monkeypatch.setattr(nvidia_smi, "look", lambda gpu: nvidia_smi.Seen(RTX4070.description, "550.1", 0))
    monkeypatch.setattr(script, "recipes", lambda: ["gpt2:124m", "gpt2:xl", "mamba:130m"])
    run = lambda *arguments: monkeypatch.setattr(sys, "argv", ["x", f"--results={tmp_path}", *arguments]) or script.main()
    out = tmp_path / "gpu_memory_rtx4070.json"
    assert run("--only=gpt2") == 1  # one of two did not fit
    kept = json.loads(out.read_text())
    assert kept["card"] == RTX4070.description and kept["driver"] == "550.1" and kept["versions"] == {"jax": "1"}
    assert list(kept["rows"]) == ["gpt2:124m", "gpt2:xl"] and "out of memory" in kept["rows"]["gpt2:xl"]["failed"]
    said = capsys.readouterr().out
    assert "| `gpt2:124m` |" in said and "Reserve in use" in said and "left out" not in said
    launch.clear()
    assert run() == 1
    assert [recipe for recipe, *_ in launch] == ["gpt2:xl", "mamba:130m"]  # what failed is tried again
    assert list(json.loads(out.read_text())["rows"]) == ["gpt2:124m", "gpt2:xl", "mamba:130m"]
    launch.clear()
    capsys.readouterr()
    assert run("--again", "--minutes=0") == 0 and not launch
    assert "left out, as 0.0 minutes are over: gpt2:124m, gpt2:xl, mamba:130m" in capsys.readouterr().out


def test_without_a_gpu_it_ends_in_a_line(script, launch, monkeypatch, capsys):
    monkeypatch.setattr("jaxvram.compare.measured.on_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert script.main() == 2 and not launch
    err = capsys.readouterr().err
    assert err.startswith("error: there is no GPU") and err.count("\n") == 1
