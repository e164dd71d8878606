"""Rules over parameter paths put arrays on a mesh; eight simulated devices learn what one does, on any mesh."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from on_eight_devices import run

from jaxvram.errors import UserError
from jaxvram.train.evaluate import EvalConfig, Evaluator
from jaxvram.train.sharding import AXES, MeshConfig, local_rows, make_mesh, shardings, spec, to_devices

ROOT = pathlib.Path(__file__).parents[2]
MESH = types.SimpleNamespace(shape=dict(zip(AXES, (2, 2, 2, 4), strict=True)))


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("h/attn/c_attn/kernel", (3, 8, 24), P(None, "fsdp", "tensor")),
        ("h/mlp/c_fc/kernel", (3, 8, 32), P(None, "fsdp", "tensor")),
        ("h/mlp/c_proj/kernel", (3, 32, 8), P(None, "tensor", "fsdp")),
        ("opt_state/1/mu/h/attn/c_proj/kernel", (3, 8, 8), P(None, "tensor", "fsdp")),  # where its parameter lies
        ("wte/embedding", (64, 8), P("tensor", "fsdp")),
        ("lm_head/kernel", (8, 64), P("fsdp", "tensor")),
        ("layers/moe/experts/up_proj/kernel", (3, 4, 8, 16), P(None, "expert", "fsdp", "tensor")),
        ("layers/moe/experts/down_proj/kernel", (3, 4, 16, 8), P(None, "expert", "tensor", "fsdp")),
        ("layers/moe/router/kernel", (3, 8, 4), P()),
        ("layers/attn/o_proj/kernel", (3, 8, 8), P(None, "tensor", "fsdp")),
        ("layers/mlp/gate_proj/kernel", (3, 8, 16), P(None, "fsdp", "tensor")),
        ("wte/embedding", (65, 8), P(None, "fsdp")),  # what cannot be cut evenly stays whole
        ("h/attn/c_attn/bias", (3, 24), P()),
        ("h/ln_1/scale", (3, 8), P()),
        ("opt_state/v_row/h/mlp/c_fc/kernel", (3, 8), P()),  # factored moments have other axes
        ("step", (), P()),
    ],
)
def test_rules(name, shape, expected):
    assert spec(name, jax.ShapeDtypeStruct(shape, "float32"), MESH) == expected


def test_meshes():
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    eight = make_mesh(MeshConfig(fsdp=2), [jax.devices()[0]] * 8)
    assert dict(eight.shape) == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1}
    for wrong in ({"fsdp": 3}, {"data": 2}, {"expert": 2}, {"expert": 0}, {"fsdp": 0}, {"data": 0}, {"data": -2}):
        with pytest.raises(UserError, match="mesh"):
            make_mesh(MeshConfig(**wrong), jax.devices()[:1])


def test_rows_of_one_process_are_all_of_them():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert local_rows(8, mesh) == slice(0, 8)
    batch = {"tokens": np.arange(16).reshape(8, 2)}
    np.testing.assert_array_equal(to_devices(batch, 8, mesh)["tokens"], batch["tokens"])
    assert all(home.mesh == mesh for home in jax.tree.leaves(shardings(batch, mesh)))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    script = pathlib.Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("eight"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory, quick_compile):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("jaxvram.train.report.write_report", lambda *args: None)
        loop, lines = run(tmp_path_factory.mktemp("one"), {})
    return lines, np.asarray(loop.final_params["wte"]["embedding"])


@pytest.mark.parametrize("name", ["4x2", "2x2x2", "moved"])
def test_eight_devices_learn_what_one_does(eight, one, name):
    """moved: three steps on data 4 x fsdp 2, three on data 2 x fsdp 2 x tensor 2, through a checkpoint."""
    assert eight["devices"] == 8
    lines, embedding = one
    assert len(lines) == 8 and lines[-1][1] < lines[0][1]
    np.testing.assert_allclose(eight[name], lines, rtol=2e-5)
    if name == "moved":
        np.testing.assert_allclose(eight["embedding"], embedding, rtol=1e-3, atol=1e-5)


def test_parameters_and_moments_really_are_cut(eight):
    parts = eight["4x2 parts"]
    matrices = {name: n for name, n in parts.items() if name.endswith(("kernel", "embedding"))}
    assert len(matrices) == 3 * len([name for name in matrices if name.startswith("params")]) > 15
    assert set(matrices.values()) == {2}
    cut_by_four = [name for name, n in eight["2x2x2 parts"].items() if n == 4]
    assert {name.rsplit("/", 3)[-2] for name in cut_by_four} == {"c_attn", "c_fc", "c_proj", "wte", "lm_head"}


def test_sampling_reads_weights_that_are_cut(eight):
    assert sum(" -> " in line for line in eight["shown"]) == 8


def test_a_batch_that_does_not_divide_is_an_error():
    mesh = make_mesh(MeshConfig(fsdp=2), [jax.devices()[0]] * 8)
    with pytest.raises(UserError, match=r"train\.batch_size=12 is not a multiple of data x fsdp x expert = 8"):
        local_rows(12, mesh)


def test_an_evaluation_that_the_devices_cannot_share_is_told_before_the_first_step():
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "expert": 1})
    with pytest.raises(UserError, match=r"eval.batch_size \(0: that of a microbatch\)=4 is not a multiple of .* 8 devices"):
        Evaluator(None, EvalConfig(), 4, mesh)
