"""Logits, loss and every gradient equal transformers' Mamba and Mamba-2: by golden file always, live where it is there."""

import functools

import make_mamba
import parity
import pytest

from jaxvram.models.mamba import MambaConfig
from jaxvram.models.mamba2 import Mamba2Config

golden = functools.partial(parity.golden, make_mamba)


def our_config(variant):
    theirs = make_mamba.VARIANTS[variant]
    common = {
        "vocab_size": make_mamba.V, "vocab_multiple": 16, "n_layer": make_mamba.L, "n_embd": make_mamba.D,
        "d_state": theirs["state_size"], "tie_head": theirs["tie_word_embeddings"], "remat": "none", "dtype": "float32",
    }  # fmt: skip
    if theirs["model_type"] == "mamba":
        return MambaConfig(**common, dt_rank=theirs["time_step_rank"])
    return Mamba2Config(**common, head_dim=theirs["head_dim"], n_groups=theirs["n_groups"])


def errors(tmp_path, variant, reference):
    return parity.language_model_errors(tmp_path, make_mamba, variant, our_config(variant), reference)


@pytest.mark.parametrize("variant", make_mamba.VARIANTS)
def test_the_golden_file(tmp_path, variant):
    parity.assert_small(errors(tmp_path, variant, golden(variant)))


@parity.needs_transformers
@pytest.mark.parametrize("variant", make_mamba.VARIANTS)
def test_transformers_itself_and_the_golden_file_is_of_it(tmp_path, variant):
    live = make_mamba.oracle(variant)
    parity.assert_small(errors(tmp_path, variant, live))
    parity.assert_golden_is_live(make_mamba, variant, live)


def test_the_comparison_can_fail(tmp_path):
    """A reference that is off by a thousandth is seen."""
    reference = golden("mamba2")
    reference["grad/backbone.layers.1.mixer.A_log"] = reference["grad/backbone.layers.1.mixer.A_log"] * 1.001
    found = errors(tmp_path, "mamba2", reference)
    assert found["layers/mixer/A_log"] > parity.TOLERANCE
