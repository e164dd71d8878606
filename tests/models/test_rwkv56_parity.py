"""RWKV-5.0, 5.1, 5.2 and 6 equal the `rwkv` package: logits, states, loss, every gradient; by golden file, and live."""

import functools

import golden_file
import make_rwkv56
import numpy as np
import parity
import pytest
import quick
from recurrent import logits_and_state

from jaxvram import convert, models
from jaxvram.convert import rwkv
from jaxvram.models.rwkv5 import RWKV5Config
from jaxvram.models.rwkv6 import RWKV6Config

SIZES = {
    "vocab_size": make_rwkv56.V, "vocab_multiple": 16, "n_layer": make_rwkv56.L, "n_embd": make_rwkv56.D,
    "head_dim": make_rwkv56.N, "d_ffn": make_rwkv56.F, "remat": "none", "dtype": "float32",
}  # fmt: skip
CFGS = {version: RWKV5Config(version=version, **SIZES) for version in ("5.0", "5.1", "5.2")}
CFGS["6"] = RWKV6Config(d_mix=make_rwkv56.MIX, d_decay=make_rwkv56.DECAY, **SIZES)
every_version = pytest.mark.parametrize("version", make_rwkv56.VARIANTS)
golden = functools.partial(parity.golden, make_rwkv56)


def ours(version, tensors):
    """Tensors by official names (weights or gradients, of which the layout is the same) as our tree."""
    layout = convert.converter(CFGS[version]).layout_of(CFGS[version])
    return rwkv.from_tensors(lambda name, shape: tensors[name].reshape(shape), CFGS[version], layout, official=True)


@functools.cache
def found(version):
    """(logits, loss, gradients) of ours."""
    params = ours(version, make_rwkv56.weights(version))
    return parity.language_model(models.build(CFGS[version]), params, **parity.of_batch(make_rwkv56))


def errors(version, reference):
    of_model = parity.errors(found(version), reference, ours(version, golden_file.part(reference, "grad")))
    model, params = models.build(CFGS[version]), ours(version, make_rwkv56.weights(version))
    _, state = logits_and_state(model, params, make_rwkv56.batch()["tokens"])
    for i in range(make_rwkv56.L):
        theirs = [reference[f"state/{3 * i + j}"] for j in range(3)]
        theirs[1] = np.swapaxes(theirs[1], -1, -2)  # theirs is keys x values
        for name, want in zip(("att_BxD", "s_BxHxNxN", "ffn_BxD"), theirs, strict=True):
            of_model[f"state/{i}/{name}"] = quick.relative_error(getattr(state, name)[i], want)
    return of_model


@every_version
def test_the_golden_file(version):
    parity.assert_small(errors(version, golden(version)))


@parity.needs_rwkv
@every_version
def test_the_package_itself_and_the_golden_file_is_of_it(version):
    live = make_rwkv56.oracle(version)
    parity.assert_small(errors(version, live))
    parity.assert_golden_is_live(make_rwkv56, version, live)


@parity.needs_rwkv
@every_version
def test_the_package_reads_what_we_write(version, tmp_path):
    cfg, tokens_T = CFGS[version], make_rwkv56.batch()["tokens"][0]
    convert.converter(cfg).save_official(ours(version, make_rwkv56.weights(version)), cfg, tmp_path / "ours.pth")
    logits_TxV, _ = golden_file.rwkv_forward(tmp_path / "ours.pth", tokens_T)
    assert quick.relative_error(logits_TxV, golden(version)["logits"][0]) < parity.TOLERANCE


@pytest.mark.parametrize(("version", "name"), [("5.0", "time_first"), ("6", "time_decay_w2")])
def test_the_comparison_can_fail(version, name):
    """A reference that is off by a thousandth is seen."""
    reference = dict(golden(version))
    reference[f"grad/blocks.1.att.{name}"] = reference[f"grad/blocks.1.att.{name}"] * 1.001
    assert errors(version, reference)[f"layers/att/{name}"] > parity.TOLERANCE
