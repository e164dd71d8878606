"""RWKV-4 equals transformers' (logits, loss, every gradient; golden file always, live if there) and the `rwkv` package."""

import os
import subprocess
import sys

import jax
import make_rwkv4
import numpy as np
import parity
import pytest
import quick

from jaxvram import models
from jaxvram.convert import rwkv, rwkv4
from jaxvram.models.rwkv4 import RWKV4Config

CFG = RWKV4Config(
    vocab_size=make_rwkv4.V, vocab_multiple=16, n_layer=make_rwkv4.L, n_embd=make_rwkv4.D, d_ffn=make_rwkv4.F,
    remat="none", dtype="float32",
)  # fmt: skip
needs_rwkv = pytest.mark.skipif(not parity.installed("torch", "rwkv"), reason="needs torch and rwkv")
golden = lambda: parity.golden(make_rwkv4, "rwkv4")


def errors(tmp_path, reference):
    return parity.language_model_errors(tmp_path, make_rwkv4, "rwkv4", CFG, reference)


def test_the_golden_file(tmp_path):
    parity.assert_small(errors(tmp_path, golden()))


@parity.needs_transformers
def test_transformers_itself_and_the_golden_file_is_of_it(tmp_path):
    live = make_rwkv4.oracle("rwkv4")
    parity.assert_small(errors(tmp_path, live))
    parity.assert_golden_is_live(make_rwkv4, "rwkv4", live)


def test_the_comparison_can_fail(tmp_path):
    """A reference that is off by a thousandth is seen."""
    reference = golden()
    name = "grad/rwkv.blocks.1.attention.time_decay"
    reference[name] = reference[name] * 1.001
    assert errors(tmp_path, reference)["layers/att/time_decay"] > parity.TOLERANCE


OFFICIAL = """
import os, sys
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read at import
import numpy, torch
from rwkv.model import RWKV
file, tokens = sys.argv[1], [int(x) for x in sys.argv[2].split(",")]
logits, state = RWKV(model=file, strategy="cpu fp32", verbose=False).forward(tokens, None, full_output=True)
numpy.savez(file + ".npz", logits=logits.numpy(), **{f"s{i}": x.numpy() for i, x in enumerate(state)})
"""


def official_weights():
    """The golden file's weights by their official names and shapes, as a .pth has them."""
    theirs, layout = make_rwkv4.weights("rwkv4"), rwkv4.layout_of(CFG)
    params = rwkv.from_tensors(lambda name, _: theirs[name], CFG, layout, official=False)
    return rwkv.to_tensors(params, CFG, layout, official=True)


@needs_rwkv
def test_the_rwkv_package_on_an_official_checkpoint(tmp_path):
    """Logits and the state behind the last token, of weights that both sides read from one .pth."""
    import torch

    file, tokens = tmp_path / "tiny", make_rwkv4.batch()["tokens"][0]
    torch.save({name: torch.tensor(x) for name, x in official_weights().items()}, f"{file}.pth")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OFFICIAL, str(file), ",".join(map(str, tokens))]
    subprocess.run(command, check=True, env=env, capture_output=True)
    theirs, params = np.load(f"{file}.npz"), rwkv4.load_params(f"{file}.pth", CFG)
    model = models.build(CFG)

    def forward(params):
        variables = {"params": params}
        state = model.apply(variables, 1, method="initial_state")
        hidden_1xTxD, state = model.apply(variables, tokens[None], state)
        return hidden_1xTxD[0] @ model.apply(variables, method="head_VxD")[: CFG.vocab_size].T, state

    logits, state = quick.jit(forward)(params)
    assert quick.relative_error(logits, theirs["logits"]) < parity.TOLERANCE
    for i in range(CFG.n_layer):
        layer = jax.tree.map(lambda x, i=i: x[i, 0], state)
        for j, mine in enumerate((layer.att_BxD, *layer.s_Bx3xD, layer.ffn_BxD)):
            assert quick.relative_error(mine, theirs[f"s{5 * i + j}"]) < parity.TOLERANCE
