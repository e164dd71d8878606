"""The average of the weights every k steps, and on the host: that of the card, after a stop too, and none of its bytes."""

import io
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from toy import ToySource, ToyTask

from jaxvram import modes
from jaxvram.errors import UserError
from jaxvram.train.average import share
from jaxvram.train.checkpoint import Checkpoints
from jaxvram.train.guard import GuardConfig
from jaxvram.train.loop import Loop
from jaxvram.train.program import make_functions, make_program
from jaxvram.train.sharding import make_mesh
from jaxvram.train.step import TrainConfig
from jaxvram.vram import plan

pytestmark = pytest.mark.usefixtures("quick_compile", "no_report")


@pytest.fixture
def run(tiny_recipe, tmp_path):
    """`run(folder, poison, stop, **train)`: a loop that was run; `stop`: the step at which it gets a signal."""

    def make(folder, poison=None, stop=None, guard=None, every=4, **train):
        fields = {"steps": 14, "ema_decay": 0.6, "guard": guard or GuardConfig(), **train}
        recipe = tiny_recipe(train=fields, eval={"every": every}, checkpoint={"every": 3})
        loop = Loop(recipe, ToyTask(ToySource(poison)), tmp_path / folder, io.StringIO())
        after = loop.average.after

        def counted(step, state):
            after(step, state)
            if step == stop:
                signal.raise_signal(signal.SIGTERM)

        loop.average.after = counted
        loop.run()
        return loop

    return make


@pytest.mark.parametrize("every", [1, 3])
def test_every_k_steps_is_what_it_says(tiny_recipe, every):
    """On the card, by hand: k steps' decay at once, after every k-th step."""
    recipe, task = tiny_recipe(train={"ema_decay": 0.6, "ema_every": every}), ToyTask()
    program = make_program(recipe, task, make_mesh(recipe.mesh))
    state = program.init()
    ema = np.asarray(state.params["wte"]["embedding"])
    for n in range(8):
        state, _ = program.step(state, task.source.batch("train", n, 8))
        if (n + 1) % every == 0:
            decay = min(0.6, (1 + n) / (10 + n)) ** every
            ema = decay * ema + (1 - decay) * np.asarray(state.params["wte"]["embedding"])
        assert quick.relative_error(state.ema["wte"]["embedding"], ema) < 1e-6
    assert quick.relative_error(state.params["wte"]["embedding"], ema) > 1e-3


def test_the_half_life_is_the_same():
    """Of a weight that has not changed since, as much is left after 60 steps by tens as by ones."""
    left = lambda every: math.prod(1 - share(0.99, every, n, np) for n in range(2000 + every - 1, 2060, every))
    assert abs(left(10) - left(1)) < 1e-5 and abs(left(1) - 0.99**60) < 1e-5
    np.testing.assert_allclose(share(0.9, 3, 5, np), share(0.9, 3, 5), rtol=1e-6)


@pytest.mark.parametrize(("every", "poison"), [(1, {5: math.nan}), (3, {})])
def test_on_the_host_it_is_that_of_the_card(run, every, poison):
    """Also of a run with a step that was skipped; what is evaluated is the average, not the weights."""
    host, card = (run(device, poison, ema_every=every, ema_device=device) for device in ("host", "card"))
    off = jax.tree.map(quick.relative_error, host.final_params, card.final_params)
    assert max(jax.tree.leaves(off)) < 1e-6
    assert abs(host.last_evaluation["loss"] / card.last_evaluation["loss"] - 1) < 1e-6
    saved, _ = Checkpoints(host.workdir).restore("latest", card.program.target)  # the same kind of checkpoint, too
    assert max(jax.tree.leaves(jax.tree.map(quick.relative_error, saved.ema, host.final_params))) == 0
    assert quick.relative_error(saved.params["wte"]["embedding"], saved.ema["wte"]["embedding"]) > 1e-3


def test_a_stop_changes_nothing(run, same):
    """Stopped between two updates and between two checkpoints: the same average, bit for bit, and the same weights."""
    whole = run("whole", ema_every=4, ema_device="host")
    assert run("parts", stop=6, ema_every=4, ema_device="host").interrupt.received == signal.SIGTERM
    parts = run("parts", ema_every=4, ema_device="host")
    assert same(whole.final_params, parts.final_params)
    target = whole.average.saved(whole.program.target)
    ends = [Checkpoints(loop.workdir).restore("latest", target)[0] for loop in (whole, parts)]
    assert same(*ends) and ends[0].step == 14
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ends[0].ema))  # restored without touching the card


def test_a_rollback_takes_the_average_with_it(run, same):
    """Back at the checkpoint, the average is that of the checkpoint; the run ends as the one on the card."""
    poison = {7: math.nan, 8: math.nan, 9: math.nan}
    ends = [
        run(device, poison, guard=GuardConfig(patience=2), ema_every=2, ema_device=device) for device in ("host", "card")
    ]
    assert [loop.rollbacks for loop in ends] == [1, 1]
    off = jax.tree.map(quick.relative_error, *(loop.final_params for loop in ends))
    assert max(jax.tree.leaves(off)) < 1e-6


def test_evaluation_and_sampling_later_read_the_average(run, tiny_recipe, monkeypatch, same):
    loop = run("run", ema_device="host")
    monkeypatch.setattr(modes, "make_task", lambda recipe, with_data=True: ToyTask())
    _, params, step = modes.load_checkpoint(loop.recipe, loop.workdir, "latest")
    assert step == 14 and same(params, loop.final_params)


def test_the_card_holds_no_average(tiny_recipe, make_task):
    """Neither does the state of a step, nor what a plan compiles; sampling says what it moves in."""
    recipe = tiny_recipe(train={"ema_decay": 0.6, "ema_device": "host"})
    task = make_task(recipe)
    state = jax.eval_shape(make_functions(recipe, task).init)
    assert state.ema is None
    on_card = tiny_recipe(train={"ema_decay": 0.6})
    weights = sum(4 * x.size for x in jax.tree.leaves(state.params))
    programs = plan.programs(recipe, task), plan.programs(on_card, task)
    host, card = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of["train"].args)) for of in programs)
    assert card - host == weights
    assert [of["sample"].from_host_bytes for of in programs] == [weights, 0]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(programs[0]["sample"].args[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema_every": 0}, r"train.ema_every=0 must be at least 1"),
        ({"ema_device": "hots"}, r"train.ema_device='hots' is unknown.*host"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields)
