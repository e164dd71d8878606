"""Mamba's and Mamba-2's sizes and starting weights; what all recurrent models must do is in test_recurrent.py."""

import dataclasses
import pathlib

import numpy as np
import pytest
from recurrent import CASES, count, fresh

from jaxvram import models, recipe
from jaxvram.errors import UserError
from jaxvram.models import mamba, mamba2
from jaxvram.models.mamba import Mamba, MambaConfig
from jaxvram.models.mamba2 import Mamba2, Mamba2Config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
both = pytest.mark.parametrize("name", ["mamba", "mamba2"])


def test_parameter_counts():
    """Of the checkpoints that the authors published: a table of 50280 rows (Mamba-2: 50288)."""
    wanted = {"130m": 129_135_360, "370m": 371_516_416, "790m": 793_204_224, "1.4b": 1_372_178_432, "2.8b": 2_768_345_600}
    assert {k: count(MambaConfig(n_layer=L, n_embd=D)) for k, (L, D) in mamba.SIZES.items()} == wanted
    wanted = {"130m": 128_989_632, "370m": 368_346_624, "780m": 780_161_280, "1.3b": 1_343_757_312, "2.7b": 2_702_599_680}
    assert {k: count(Mamba2Config(n_layer=L, n_embd=D)) for k, (L, D) in mamba2.SIZES.items()} == wanted


@both
def test_recipes_have_the_papers_sizes(name):
    for variant, (n_layer, n_embd) in {"mamba": mamba.SIZES, "mamba2": mamba2.SIZES}[name].items():
        if variant in ("2.8b", "2.7b"):  # no optimizer of ours trains them in 12 GB
            continue
        built = recipe.build(*recipe.load(f"{CONFIGS}/{name}.py:{variant}"))
        assert (built.model.n_layer, built.model.n_embd, built.model.table_rows) == (n_layer, n_embd, 50304)
        assert built.model.reset_token == 50256  # what llm.c's shards put before each document


@both
def test_starting_weights(name):
    many_heads = {"head_dim": 1} if name == "mamba2" else {}
    cfg = dataclasses.replace(CASES[name].cfg, n_layer=4, n_embd=64, vocab_size=500, **many_heads)
    p = fresh(cfg)
    mixer, E = p["layers"]["mixer"], cfg.d_inner
    table = p["embedding"]["embedding"]
    assert (table[500:] == 0).all() and abs(table[:500].std() / 0.02 - 1) < 0.02
    for matrix, bound in (("in_proj", 64**-0.5), ("out_proj", E**-0.5 / 2)):  # of 4 layers
        kernel = mixer[matrix]["kernel"]
        assert 0.99 * bound < np.abs(kernel).max() <= bound and abs(kernel.std() / bound - 3**-0.5) < 0.02
    for leaf in mixer["conv1d"].values():
        assert 0.45 < np.abs(leaf).max() <= 0.5
    delta = np.log1p(np.exp(mixer["dt_bias"]))
    assert 0.99e-3 < delta.min() < 1.5e-3 and 0.07 < delta.max() < 0.101
    assert abs(np.log(delta).mean() - np.log(0.01)) < 0.2  # uniform in its logarithm
    assert (mixer["D"] == 1).all()
    if name == "mamba":
        np.testing.assert_allclose(np.exp(mixer["A_log"]), np.broadcast_to(np.arange(1.0, 5), (4, E, 4)), rtol=1e-6)
        assert np.abs(mixer["dt_proj"]["kernel"]).max() <= cfg.rank**-0.5
    else:
        A = np.exp(mixer["A_log"])
        assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.7


@pytest.mark.parametrize(("cls", "fields", "message"), [
    (MambaConfig, {"remat": "som"}, r"model.remat='som' is unknown"),
    (MambaConfig, {"dtype": "float16"}, "model.dtype='float16' is unknown"),
    (MambaConfig, {"d_conv": 1}, "d_conv at least 2"),
    (MambaConfig, {"reset_token": 50277}, "model.reset_token=50277 is no token"),
    (Mamba2Config, {"head_dim": 60}, "head_dim=60 does not divide"),
    (Mamba2Config, {"n_groups": 5}, "n_groups=5 does not divide the 24 heads"),
    (Mamba2Config, {"kernels": "cuda"}, "model.kernels='cuda' is unknown"),
])  # fmt: skip
def test_bad_fields(cls, fields, message):
    with pytest.raises(UserError, match=message):
        cls(**fields)


def test_the_classes_are_the_configurations():
    assert isinstance(models.build(CASES["mamba"].cfg), Mamba) and isinstance(models.build(CASES["mamba2"].cfg), Mamba2)
