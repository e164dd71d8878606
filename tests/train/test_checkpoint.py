"""Checkpoints: what was saved comes back, what is damaged or does not fit is told, what was cut off is cleared away."""

import gc
import json
import pathlib
import resource
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyTask

from jaxvram.errors import UserError
from jaxvram.train.checkpoint import CheckpointConfig, Checkpoints, check_workdir, look
from jaxvram.train.program import make_program
from jaxvram.train.sharding import make_mesh


@pytest.fixture(scope="module")
def program(tiny_recipe):
    recipe = tiny_recipe(train={"ema_decay": 0.9})
    return make_program(recipe, ToyTask(), make_mesh(recipe.mesh))


@pytest.fixture(scope="module")
def state(program):
    return program.step(program.init(), ToyTask().source.batch("train", 0, 8))[0]


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder)
    checkpoints.save("latest", 7, state, {"note": [1, float("inf")]})
    checkpoints.save("best", 7, state, {"loss": 1.5})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_was_saved_comes_back(saved, program, state, same):
    restored, meta = Checkpoints(saved).restore("latest", program.target)
    assert same(restored, state) and meta["note"] == [1, float("inf")] and meta["step"] == 7
    weights, meta = Checkpoints(saved).restore_weights("best", program.target)
    assert same(weights, {"params": state.params, "ema": state.ema}) and meta["loss"] == 1.5
    assert Checkpoints(saved).best_step() == 7 and Checkpoints(saved / "nowhere").best_step() is None


def test_weights_come_without_the_average_for_who_asks_for_none(saved, program, state, same):
    weights, _ = Checkpoints(saved).restore_weights("best", program.target.replace(ema=None))
    assert weights.keys() == {"params"} and same(weights["params"], state.params)


def files_of(folder: pathlib.Path):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("damage", ["cut", "garbled", "gone"])
def test_damage_is_told_in_one_line_or_does_no_harm(copy, program, state, same, damage, capfd):
    told = 0
    for path in files_of(copy / "checkpoints" / "latest"):
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            half = len(content) // 2
            garbled = bytes(b ^ 0x5A for b in content[half : half + 16])
            path.write_bytes(content[:half] if damage == "cut" else content[:half] + garbled + content[half + 16 :])
        try:
            restored, _ = Checkpoints(copy).restore("latest", program.target)
            assert same(restored, state), path
        except UserError as error:
            told += 1
            assert "is damaged" in str(error) and "\n" not in str(error) and "--workdir" in str(error)
        path.write_bytes(content)
    assert told >= 4
    assert "Traceback" not in capfd.readouterr().err


def test_what_orbax_leaves_behind_a_failed_read_is_not_told_on_top(copy, monkeypatch):
    """It closes the event loop on reads that have not begun; Python warns of each, whenever it collects them."""

    async def read():
        pass

    def action():
        left = [read()]
        left.append(left)  # in a cycle, as a task and its event loop are
        raise ValueError("an array is gone")

    told = []
    monkeypatch.setattr(warnings, "showwarning", lambda *args, **_: told.append(args))
    with warnings.catch_warnings(), pytest.raises(UserError, match="an array is gone"):
        warnings.simplefilter("always")
        Checkpoints(copy)._try("restore", 7, "latest", action)
    gc.collect()
    assert not told


def test_a_wrong_number_among_the_right_ones_is_noticed(copy, program):
    """Stored bytes without a checksum of their own would come back as other weights."""
    path = copy / "checkpoints" / "latest" / "7" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["inventory"]["params/ln_f/bias"][2] += 1
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="arrays are not those that were saved"):
        Checkpoints(copy).restore("latest", program.target)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: p | {"ln_f": {"bias": jnp.zeros(6)}},
            r"params/ln_f/bias is \(5,\) float32 there and \(6,\) float32 here",
        ),
        (lambda p: p | {"more": jnp.zeros(2)}, r"params/more is missing there and \(2,\) float32 here"),
        (lambda p: {"wte": p["wte"]}, r"params/ln_f/bias is \(5,\) float32 there and missing here"),
        (
            lambda p: p | {"ln_f": {"bias": jnp.zeros(5, jnp.bfloat16)}},
            r"\(5,\) float32 there and \(5,\) bfloat16 here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_told_by_its_first_parameter(saved, state, change, message, capfd):
    with pytest.raises(UserError, match=message):
        Checkpoints(saved).restore("latest", state.replace(params=change(state.params)))
    assert capfd.readouterr().err == ""


def test_there_is_none(tmp_path, program):
    with pytest.raises(UserError, match=r"no checkpoint in .*train first"):
        Checkpoints(tmp_path).restore("latest", program.target)
    assert not list(tmp_path.iterdir())


def test_one_of_each_kind_is_kept_and_the_best_may_come_again_at_an_earlier_step(tmp_path, program, state):
    checkpoints = Checkpoints(tmp_path)
    later = jax.tree.map(lambda x: x + 1, state)
    for step, what, loss in ((10, state, 3.0), (20, state, 2.0), (10, later, 1.0)):
        checkpoints.save("latest", step, what, {})
        checkpoints.save("best", step, what, {"loss": loss})
        checkpoints.wait()
        weights, meta = checkpoints.restore_weights("best", program.target)
        assert (meta["step"], meta["loss"]) == (step, loss)
        np.testing.assert_array_equal(weights["params"]["ln_f"]["bias"], what.params["ln_f"]["bias"])
        assert [len(list((tmp_path / "checkpoints" / kind).iterdir())) for kind in ("latest", "best")] == [1, 1]
    assert checkpoints.best_step() == 10


def test_what_was_cut_off_is_no_checkpoint_and_is_cleared_away(copy, program, state, same):
    latest = copy / "checkpoints" / "latest"
    shutil.copytree(latest / "7", latest / "9.orbax-checkpoint-tmp")
    assert look(copy).step == 7 and look(copy).unfinished == ["9.orbax-checkpoint-tmp"]
    checkpoints = Checkpoints(copy)
    assert same(checkpoints.restore("latest", program.target)[0], state)
    checkpoints.discard_unfinished()
    assert [path.name for path in latest.iterdir()] == ["7"]
    checkpoints.save("latest", 9, state, {})
    checkpoints.close()
    assert look(copy).step == 9 and look(copy).unfinished == []


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_it(copy, program, state, same, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(copy)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # no file may grow beyond 64 bytes
    try:
        with pytest.raises(UserError, match=r"could not write .*latest/8"):
            checkpoints.save("latest", 8, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert look(copy).step == 7
    assert same(Checkpoints(copy).restore("latest", program.target)[0], state)


def test_a_folder_belongs_to_its_recipe(tmp_path, tiny_recipe):
    import dataclasses

    recipe = tiny_recipe()
    check_workdir(tmp_path / "new", recipe)
    (tmp_path / "config.json").write_text(json.dumps(recipe.as_dict()))
    check_workdir(tmp_path, recipe)
    check_workdir(tmp_path, tiny_recipe(train={"steps": 99}, model={"remat": "full"}))
    with pytest.raises(UserError, match="was made by tiny:test, not by tiny:other"):
        check_workdir(tmp_path, dataclasses.replace(recipe, variant="other"))
    with pytest.raises(UserError, match=r"model.n_layer=1, not 3"):
        check_workdir(tmp_path, tiny_recipe(model={"n_layer": 3}))
    seen = {"vocabulary": "8 characters, a"}
    (tmp_path / "config.json").write_text(json.dumps(recipe.as_dict() | {"data_identity": seen}))
    check_workdir(tmp_path, recipe, seen)
    with pytest.raises(UserError, match=r"another vocabulary \(8 characters, a\) than this data has \(8 characters, b\)"):
        check_workdir(tmp_path, recipe, {"vocabulary": "8 characters, b"})
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(UserError, match="is damaged"):
        check_workdir(tmp_path, recipe)


@pytest.mark.parametrize("wrong", [{"every": -1}, {"stop_without_improvement": -1}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match="checkpoint"):
        CheckpointConfig(**wrong)
