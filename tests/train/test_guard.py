"""Bad steps are skipped, counted and shown; a streak of them goes back to the last checkpoint, and in the end gives up."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToySource, ToyTask

from jaxvram.errors import UserError
from jaxvram.train import metrics
from jaxvram.train.checkpoint import Checkpoints
from jaxvram.train.guard import Guard, GuardConfig, judge
from jaxvram.train.loop import Loop
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("no_report")
NAN, INF = float("nan"), float("inf")


def run_judge(cfg, pairs):
    guard, verdicts = Guard.fresh(cfg), []
    step = jax.jit(lambda guard, loss, norm: judge(guard, loss, norm, cfg))
    for loss, norm in pairs:
        good, guard = step(guard, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(bool(good))
    return verdicts, guard


def noisy(n, around=2.0):
    return [(around + 0.1 * math.sin(7 * i), 1 + 0.1 * math.cos(5 * i)) for i in range(n)]


@pytest.mark.parametrize("bad", [(NAN, 1.0), (2.0, NAN), (INF, 1.0), (2.0, INF)])
def test_what_is_not_finite_is_skipped_from_the_first_step_on_and_never_remembered(bad):
    verdicts, guard = run_judge(GuardConfig(window=4), [bad, *noisy(2), bad, bad])
    assert verdicts == [False, True, True, False, False]
    assert (guard.skipped, guard.streak, guard.seen) == (3, 2, 2) and jnp.isfinite(guard.recent_Wx2).all()


@pytest.mark.parametrize("spike", [(50.0, 1.0), (2.0, 50.0)])
def test_an_outlier_is_skipped_once_the_window_is_full(spike):
    early, _ = run_judge(GuardConfig(window=16), [*noisy(15), spike])
    late, guard = run_judge(GuardConfig(window=16, z_score=3), [*noisy(16), spike, *noisy(3)])
    assert all(early) and late == [True] * 16 + [False] + [True] * 3
    assert guard.skipped == 1 and guard.streak == 0


def test_the_bound_is_z_score_deviations_above_the_mean():
    seen = noisy(32)
    losses = np.array([loss for loss, _ in seen], np.float32)
    bound = losses.mean() + 4 * losses.std()
    for loss, expected in ((bound - 0.01, True), (bound + 0.01, False)):
        assert run_judge(GuardConfig(window=32, z_score=4), [*seen, (loss, 1.0)])[0][-1] is expected


@pytest.mark.parametrize(("norm", "expected"), [(2.5, True), (3.5, False)])
def test_a_norm_that_clipping_deals_with_is_no_outlier(norm, expected):
    """Both lie more than eight deviations out; only the second is also more than three times the mean."""
    assert run_judge(GuardConfig(window=16), [*noisy(16), (2.0, norm)])[0][-1] is expected


@pytest.mark.parametrize("loss", [6.0, 1e6])
def test_a_lasting_divergence_is_skipped_for_as_long_as_the_guard_is_patient(loss):
    """What is skipped must not widen the window, or a third outlier would pass for normal."""
    cfg = GuardConfig()
    verdicts, guard = run_judge(cfg, [*noisy(150), *[(loss, 1.0)] * cfg.patience])
    assert verdicts == [True] * 150 + [False] * cfg.patience
    assert guard.streak == guard.longest == cfg.patience and guard.recent_Wx2.max() < 3


def test_a_norm_that_rises_for_good_is_followed():
    """Gradients grow eightfold while the loss falls: a model has found what there is to learn. No rollback, few skips."""
    verdicts, guard = run_judge(GuardConfig(), [*noisy(150), *[(1.9, 8 + 0.5 * math.sin(n)) for n in range(100)]])
    assert verdicts[:150] == [True] * 150 and not verdicts[150]
    skipped = verdicts.count(False)
    assert 1 < skipped < 15 and all(verdicts[-80:])
    assert (guard.streak, guard.longest, guard.skipped) == (0, 0, skipped)


def test_a_norm_that_rises_with_the_loss_is_not_followed():
    cfg = GuardConfig()
    verdicts, guard = run_judge(cfg, [*noisy(150), *[(6.0, 8.0)] * 40])
    assert verdicts == [True] * 150 + [False] * 40 and guard.streak == 40 and guard.recent_Wx2.max() < 3


def test_a_streak_that_ended_is_still_told():
    """The loop reads it every few steps only."""
    _, guard = run_judge(GuardConfig(window=4), [*noisy(2), (NAN, 1.0), (NAN, 1.0), *noisy(3)])
    assert guard.streak == 0 and guard.longest == 2
    assert guard.set_back().longest == 0


def test_a_fall_is_no_outlier():
    assert all(run_judge(GuardConfig(window=16, z_score=3), [*noisy(16), (0.01, 0.01)])[0])


def test_without_a_z_score_only_what_is_not_finite_is_skipped():
    assert run_judge(GuardConfig(window=4, z_score=0), [*noisy(8), (1e9, 1e9), (NAN, 1.0)])[0] == [True] * 9 + [False]


def test_a_skipped_step_leaves_everything_it_would_have_changed(tiny_recipe, same):
    recipe, task = tiny_recipe(train={"ema_decay": 0.9}), ToyTask(ToySource({2: NAN, 4: INF}))
    program = make_program(recipe, task, make_mesh(recipe.mesh))
    state = program.init()
    for n in range(6):
        before = jax.device_get((state.params, state.opt_state, state.ema))
        state, values = program.step(state, task.source.batch("train", n, 8))
        assert same(before, (state.params, state.opt_state, state.ema)) == (n in (2, 4))
        assert values["skipped"] == (n >= 2) + (n >= 4) and values["skipped_in_a_row"] == (n >= 2)
    assert state.step == 6
    np.testing.assert_allclose(
        values["learning_rate"], 0.01, rtol=1e-6
    )  # the schedule counts updates: the fourth of them


def a_run(tiny_recipe, tmp_path, poison, steps=24, patience=3, max_rollbacks=2, every=5):
    recipe = tiny_recipe(
        train={"steps": steps, "guard": GuardConfig(patience=patience, max_rollbacks=max_rollbacks)},
        eval={"every": every},
    )
    stream = io.StringIO()
    loop = Loop(recipe, ToyTask(ToySource(poison)), tmp_path / "run", stream)
    return loop, stream


def test_skipped_steps_are_counted_and_shown(tiny_recipe, tmp_path):
    loop, stream = a_run(tiny_recipe, tmp_path, {6: NAN, 8: NAN})
    loop.run()
    lines = [line for line in metrics.read(tmp_path / "run") if "split" not in line]
    assert [line["skipped"] for line in lines] == [0] * 6 + [1] * 2 + [2] * 16
    assert math.isnan(lines[6]["loss"]) and math.isfinite(lines[7]["loss"])
    assert "2 skipped" in stream.getvalue()


def test_a_streak_goes_back_to_the_last_checkpoint_and_on_with_other_batches(tiny_recipe, tmp_path, same):
    loop, stream = a_run(tiny_recipe, tmp_path, {11: NAN, 12: NAN, 13: NAN})
    loop.run()
    assert (
        "3 steps in a row were skipped: back to step 10, past the batches up to 15 (rollback 1 of 2)"
        in stream.getvalue()
    )
    lines = [line for line in metrics.read(tmp_path / "run") if "split" not in line]
    assert [line["step"] for line in lines] == list(range(1, 25)) and not any(line["skipped"] for line in lines)
    # the same run on data that never had the bad batches
    source = ToySource()
    make = source.batch
    source.batch = lambda split, n, *rest: make(split, n + 5 if split == "train" and n >= 10 else n, *rest)
    other = Loop(loop.recipe, ToyTask(source), tmp_path / "other", io.StringIO())
    other.run()
    assert same(loop.final_params, other.final_params)
    meta = Checkpoints(tmp_path / "run").restore("latest", loop.program.target)[1]
    assert meta["rollbacks"] == 1


def test_a_streak_between_two_readings_is_not_missed(tiny_recipe, tmp_path):
    """Metrics are read every few steps: bad steps 12 to 14 end before step 20 is looked at."""
    loop, stream = a_run(tiny_recipe, tmp_path, {11: NAN, 12: NAN, 13: NAN}, every=10)
    object.__setattr__(loop.recipe.train, "log_every", 10)
    loop.run()
    assert "3 steps in a row were skipped: back to step 10, past the batches up to 20" in stream.getvalue()


def test_a_checkpoint_in_the_middle_of_a_streak_is_a_fresh_start(tiny_recipe, tmp_path):
    """Steps 9 and 10 are bad and step 10 is saved: after the rollback, one more bad step is one, not three."""
    poison = {8: NAN, 9: NAN, 10: NAN, 12: NAN}
    loop, stream = a_run(tiny_recipe, tmp_path, poison, every=10, max_rollbacks=1)
    loop.run()
    assert stream.getvalue().count("rollback") == 1


def test_after_a_rollback_a_resumed_run_goes_on_with_the_same_batches(tiny_recipe, tmp_path, same):
    poison = {11: NAN, 12: NAN, 13: NAN}
    whole, _ = a_run(tiny_recipe, tmp_path / "whole", poison)
    whole.run()
    first, _ = a_run(tiny_recipe, tmp_path / "parts", poison)
    first._out_of_patience = lambda step: step == 15
    first.run()
    second, _ = a_run(tiny_recipe, tmp_path / "parts", poison)
    second.run()
    assert same(whole.final_params, second.final_params)


def test_a_run_that_cannot_recover_says_so(tiny_recipe, tmp_path, no_report):
    loop, stream = a_run(tiny_recipe, tmp_path, dict.fromkeys(range(11, 99), NAN))
    with pytest.raises(
        UserError, match=r"diverged: 3 steps in a row .* rolled back 2 times already; lower optimizer.learning"
    ):
        loop.run()
    assert "rollback 2 of 2" in stream.getvalue()
    assert no_report[-1].startswith("failed: the run diverged")


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"guard": GuardConfig(patience=3)})
    with pytest.raises(UserError, match="no checkpoint to go back to"):
        Loop(recipe, ToyTask(ToySource(dict.fromkeys(range(99), INF))), tmp_path / "run", stream=io.StringIO()).run()


@pytest.mark.parametrize("wrong", [{"window": 0}, {"patience": 0}, {"z_score": -1.0}, {"max_rollbacks": -1}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=r"train\.guard"):
        GuardConfig(**wrong)
