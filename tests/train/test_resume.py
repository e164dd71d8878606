"""A run that was interrupted, or killed at any moment, comes to the same end as one that was not: bit for bit."""

import dataclasses
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from jaxvram import recipe as recipes
from jaxvram.main import main
from jaxvram.modes import make_task as task_of
from jaxvram.train import metrics
from jaxvram.train.checkpoint import Checkpoints
from jaxvram.train.loop import Loop
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 240
ARGUMENTS = [
    "--config=configs/mingpt_sort.py", f"--config.train.steps={STEPS}", "--config.train.batch_size=8",
    "--config.model.n_layer=1", "--config.model.n_head=2", "--config.model.n_embd=8", "--config.eval.every=80",
    "--config.eval.batches=1", "--config.task.score_problems=8", "--config.checkpoint.every=20",
    "--config.train.log_every=5",
]  # fmt: skip


def losses(workdir):
    keep = ("step", "split", "loss", "grad_norm", "learning_rate", "skipped", "exact_match")
    return [{k: line[k] for k in keep if k in line} for line in metrics.read(workdir)]


def test_sixty_steps_are_thirty_an_end_and_thirty_more(tiny_recipe, make_task, tmp_path, same, no_report):
    recipe = tiny_recipe(
        train={"steps": 60, "ema_decay": 0.9, "log_every": 7}, eval={"every": 20}, checkpoint={"every": 15}
    )

    program = None

    def run(folder, stop=None, death=None):
        nonlocal program
        loop = Loop(recipe, make_task(recipe), tmp_path / folder, io.StringIO())
        program = program or loop.program  # compiled once
        loop.program = dataclasses.replace(program)
        step = program.step

        def counted(state, batch, count=[0]):  # noqa: B006
            count[0] += 1
            if count[0] == stop:
                signal.raise_signal(signal.SIGTERM)
            if count[0] == death:
                raise RuntimeError("killed")
            return step(state, batch)

        loop.program.step = counted
        loop.run()
        return loop

    whole = run("whole")
    assert run("parts", stop=30).interrupt.received == signal.SIGTERM
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", death=22)  # step 52: back to the checkpoint of step 45
    parts = run("parts")
    assert same(whole.final_params, parts.final_params)
    states = [
        Checkpoints(tmp_path / folder).restore("latest", whole.program.target)[0] for folder in ("whole", "parts")
    ]
    assert same(*states) and states[0].step == 60
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    best = [
        Checkpoints(tmp_path / folder).restore_weights("best", whole.program.target) for folder in ("whole", "parts")
    ]
    assert same(best[0][0], best[1][0]) and best[0][1]["step"] == best[1][1]["step"]


class Started:
    """launch.py in a process of its own, in the folder `cwd`."""

    def __init__(self, workdir, log):
        self.latest = workdir / "checkpoints" / "latest"
        self.log = log
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, "launch.py", *ARGUMENTS, f"--workdir={workdir}"]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def saved(self):
        return {p.name for p in self.latest.iterdir()} if self.latest.is_dir() else set()

    def wait_for(self, condition):
        limit = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None and time.monotonic() < limit, self.log.read_text()

    def end_with(self, number):
        self.process.send_signal(number)
        code = self.process.wait(120)
        return code, self.log.read_text()


def test_killed_in_the_middle_of_a_save_and_at_some_moment_and_asked_to_end(tmp_path, same, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["launch.py", *ARGUMENTS, f"--workdir={whole}"]) == 0

    run = Started(parts, tmp_path / "1.log")
    complete = lambda: {name for name in run.saved() if name.isdigit()}
    run.wait_for(lambda: complete() and any("tmp" in name for name in run.saved()))
    assert run.end_with(signal.SIGKILL)[0] == -signal.SIGKILL
    steps = sorted(int(name) for name in complete())
    assert steps

    run = Started(parts, tmp_path / "2.log")
    run.wait_for(lambda: max(map(int, complete()), default=0) > steps[-1])
    time.sleep(random.random() / 5)
    _, log = run.end_with(signal.SIGKILL)
    assert f"resuming {parts} from its checkpoint of step {steps[-1]}" in log
    steps = sorted(int(name) for name in complete())

    run = Started(parts, tmp_path / "3.log")
    run.wait_for(lambda: max(map(int, complete()), default=0) > steps[-1])
    code, log = run.end_with(signal.SIGTERM)
    assert code == 143 and "SIGTERM: saved step" in log and "Traceback" not in log

    capsys.readouterr()
    assert main(["launch.py", *ARGUMENTS, f"--workdir={parts}"]) == 0
    assert f"resuming {parts}" in capsys.readouterr().out
    config, name, variant = recipes.load(str(ROOT / "configs/mingpt_sort.py"))
    made = json.loads((parts / "config.json").read_text())
    for section in ("model", "train", "eval", "checkpoint"):
        for field in config[section]:
            if field in made[section] and not isinstance(made[section][field], dict):
                config[section][field] = made[section][field]
    recipe = recipes.build(config, name, variant)
    target = make_program(recipe, task_of(recipe), make_mesh(recipe.mesh)).target
    (state, _), (resumed, _) = (Checkpoints(folder).restore("latest", target) for folder in (whole, parts))
    assert same(state, resumed) and state.step == STEPS
    assert losses(whole) == losses(parts) and losses(whole)[-1]["step"] == STEPS
    assert not [name for name in run.saved() if "tmp" in name] and len(run.saved()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_names_the_signal(tmp_path, monkeypatch, capsys, no_report, number, code):
    monkeypatch.setattr("jaxvram.tasks.language.LanguageTask.scores", lambda *_: signal.raise_signal(number) or {})
    assert main(["launch.py", *ARGUMENTS, f"--workdir={tmp_path / 'run'}"]) == code
    out, err = capsys.readouterr()
    assert f"{signal.Signals(number).name}: saved step 81; the same command resumes from here" in out and not err
    assert jax.default_backend() == "cpu"
