"""Two processes that meet through jax.distributed train together, as one would alone; only the first writes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxvram.main import main
from jaxvram.train import metrics
from jaxvram.train.checkpoint import look

pytestmark = pytest.mark.usefixtures("quick_compile", "no_report")
ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = [
    f"--config={ROOT}/configs/mingpt_sort.py", "--config.train.batch_size=8", "--config.model.n_layer=1",
    "--config.model.n_head=2", "--config.model.n_embd=8", "--config.eval.every=4", "--config.eval.batches=2",
    "--config.task.score_problems=8", "--config.train.log_every=1",
]  # fmt: skip


def losses(workdir):
    return [(line["step"], line["loss"], line.get("grad_norm", 0)) for line in metrics.read(workdir)]


class Pair:
    """launch.py twice, each with one CPU device."""

    def __init__(self, folder, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
        command = [sys.executable, str(ROOT / "launch.py"), *ARGUMENTS, *arguments, f"--workdir={folder / 'run'}"]
        command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        self.logs = [folder / f"{i}-{time.time_ns()}.log" for i in (0, 1)]
        self.processes = []
        for i, log in enumerate(self.logs):
            with open(log, "w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*command, f"--process_id={i}"], env=environment, stdout=out, stderr=subprocess.STDOUT
                    )
                )

    def wait(self):
        try:
            codes = [process.wait(300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return codes, [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight steps by two processes, with all weights cut in two."""
    folder = tmp_path_factory.mktemp("pair")
    codes, logs = Pair(folder, "--config.train.steps=8", "--config.mesh.data=1", "--config.mesh.fsdp=2").wait()
    return folder, codes, logs


def test_two_processes_learn_what_one_does(trained, tmp_path):
    folder, codes, logs = trained
    assert codes == [0, 0], logs
    assert main(["launch.py", *ARGUMENTS, "--config.train.steps=8", f"--workdir={tmp_path / 'run'}"]) == 0
    alone = losses(tmp_path / "run")
    assert len(alone) == 10
    np.testing.assert_allclose(losses(folder / "run"), alone, rtol=2e-5)


def test_only_the_first_process_speaks_and_writes(trained):
    folder, _, logs = trained
    assert "validation loss" in logs[0] and "run folder" in logs[0] and "Traceback" not in logs[0] + logs[1]
    assert not [line for line in logs[1].splitlines() if not line.startswith("[Gloo]")]  # the transport's own greeting
    steps = [line["step"] for line in metrics.read(folder / "run") if "split" not in line]
    assert steps == list(range(1, 9)) and look(folder / "run").step == 8


def test_a_signal_to_one_stops_both_at_one_step_and_one_process_goes_on(trained, tmp_path):
    pair = Pair(tmp_path, "--config.train.steps=5000", "--config.eval.every=1000")
    limit = time.monotonic() + 240
    while not metrics.read(tmp_path / "run"):
        assert time.monotonic() < limit and all(process.poll() is None for process in pair.processes)
        time.sleep(0.1)
    pair.processes[1].send_signal(signal.SIGTERM)
    codes, logs = pair.wait()
    assert codes == [143, 143], logs
    stopped = look(tmp_path / "run").step
    assert stopped and f"SIGTERM: saved step {stopped}" in logs[0]
    more = [f"--config.train.steps={stopped + 2}", f"--workdir={tmp_path / 'run'}"]
    assert main(["launch.py", *ARGUMENTS, *more]) == 0  # a checkpoint of two processes, read by one
    assert look(tmp_path / "run").step == stopped + 2
