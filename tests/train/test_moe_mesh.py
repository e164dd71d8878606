"""Experts divided among eight simulated devices learn what they learn on one, by rules over parameter paths alone."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from moe_on_devices import CAPACITY, MESHES, MICROBATCH, E, T, run

from jaxvram.errors import UserError
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.models.moe import MoEConfig
from jaxvram.train.sharding import check_experts

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def eight():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    command = [sys.executable, str(pathlib.Path(__file__).with_name("moe_on_devices.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=CAPACITY)
def one(request, quick_compile):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return request.param, run(CAPACITY[request.param], {}, jax.devices()[:1])[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_learn_what_one_does(eight, one, mesh):
    how, lines = one
    assert eight["devices"] == 8 and lines[-1][1] < lines[0][1]
    assert (lines[-1][3] > 0) == (how != "dropless")
    np.testing.assert_allclose(eight[f"{mesh}, {how}"]["lines"], lines, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_and_their_moments_are_divided(eight, mesh):
    parts = eight[f"{mesh}, dropless"]["cut"]
    assert len(parts) == 9 and set(parts.values()) == {int(np.prod([n for a, n in MESHES[mesh].items() if a != "data"]))}


def test_with_a_capacity_a_device_multiplies_by_its_own_experts_alone(eight):
    room = int(1.5 * MICROBATCH * T * 2 / E)  # of one expert
    assert eight["2x4, with room for 1.5"]["rows"] == [room * E // MESHES["2x4"]["expert"]]


def test_experts_that_cannot_be_divided_are_told():
    mesh = lambda parts: types.SimpleNamespace(shape={"expert": parts})
    check_experts(MoEConfig(n_expert=8), mesh(4))
    check_experts(GPT2Config(), mesh(1))
    with pytest.raises(UserError, match=r"model.n_expert=8 cannot be divided among mesh.expert=3 parts"):
        check_experts(MoEConfig(n_expert=8), mesh(3))
    with pytest.raises(UserError, match=r"mesh.expert=2: this model has no experts"):
        check_experts(GPT2Config(), mesh(2))
