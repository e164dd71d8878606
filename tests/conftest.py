"""The suite runs on the CPU unless told otherwise, and touches neither the network nor the home folder.

Scripts that made golden files can be imported by their tests.
"""

import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
TEMP = (
    pathlib.Path(tempfile.gettempdir()) / f"jaxvram-tests-{os.getuid()}"
)  # kept from run to run: compiled programs alone

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(TEMP / "jax")
)  # shared by workers and by processes that tests start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["JAXVRAM_CACHE"] = str(TEMP / "no-downloads")
os.environ["MPLBACKEND"] = "agg"
os.environ["MPLCONFIGDIR"] = str(TEMP / "matplotlib")
os.environ.pop("JAXVRAM_DATA", None)
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent / "golden")]

import dataclasses  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxvram import data  # noqa: E402
from jaxvram.finetune.config import FinetuneConfig  # noqa: E402
from jaxvram.models.gpt2 import GPT2, GPT2Config  # noqa: E402
from jaxvram.recipe import Recipe  # noqa: E402
from jaxvram.sample.text import SampleConfig  # noqa: E402
from jaxvram.tasks.language import LanguageConfig, LanguageTask  # noqa: E402
from jaxvram.train.checkpoint import CheckpointConfig  # noqa: E402
from jaxvram.train.evaluate import EvalConfig  # noqa: E402
from jaxvram.train.optimizer import OptimizerConfig  # noqa: E402
from jaxvram.train.sharding import MeshConfig  # noqa: E402
from jaxvram.train.step import TrainConfig  # noqa: E402

pytest.register_assert_rewrite("quick", "parity", "checkpoints", "recurrent")  # their assertions say what they compared


@pytest.fixture(scope="module")
def quick_compile():
    """Programs that run a few steps need not be optimised; XLA:CPU is three times faster without."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def no_report(monkeypatch):
    """Instead of a second of drawing at each start and end, the list of what the report would have said of the run."""
    statuses = []
    monkeypatch.setattr("jaxvram.train.report.write_report", lambda workdir, status, clock: statuses.append(status))
    return statuses


@pytest.fixture(scope="session")
def tiny_recipe():
    """`tiny_recipe(train={"steps": 5}, ...)`: sorting four digits with a GPT-2 of 1,000 parameters, sections overridden."""
    base = Recipe(
        name="tiny",
        variant="test",
        task=LanguageConfig(score_problems=16),
        model=GPT2Config(
            vocab_size=3, block_size=7, n_layer=1, n_head=2, n_embd=8, dropout=0.1, remat="none", dtype="float32"
        ),
        data=data.DataConfig(name="sort", length=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        train=TrainConfig(steps=20, batch_size=8, log_every=1),
        eval=EvalConfig(every=10, batches=2),
        sample=SampleConfig(num_samples=2, max_new_tokens=4),
        checkpoint=CheckpointConfig(),
        mesh=MeshConfig(),
        finetune=FinetuneConfig(),
    )

    def make(**sections) -> Recipe:
        changed = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
        return dataclasses.replace(base, **changed)

    return make


@pytest.fixture(scope="session")
def make_task():
    """The task of a recipe of `tiny_recipe`."""

    def make(recipe) -> LanguageTask:
        source = data.load(recipe.data, recipe.model.block_size, recipe.train.seed)
        return LanguageTask(GPT2(recipe.model), source, recipe.task, recipe.sample)

    return make


@pytest.fixture(scope="session")
def same():
    """`same(a, b)`: two trees are equal bit for bit."""

    def check(a, b) -> bool:
        leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
        bits = lambda x: np.asarray(x).tobytes()
        return len(leaves_a) == len(leaves_b) and all(
            bits(x) == bits(y) for x, y in zip(leaves_a, leaves_b, strict=True)
        )

    return check
