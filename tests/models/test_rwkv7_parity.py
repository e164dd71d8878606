"""RWKV-7 equals rwkv7_hf (logits, loss, every gradient; by golden file always, live where it is) and the `rwkv` package."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import make_rwkv7
import numpy as np
import parity
import pytest
import quick
from recurrent import logits_and_state

from jaxvram import models
from jaxvram.convert import rwkv, rwkv7
from jaxvram.kernels.wkv7 import wkv7
from jaxvram.models.rwkv7 import RWKV7Config

CFG = RWKV7Config(
    vocab_size=make_rwkv7.V, vocab_multiple=16, n_layer=make_rwkv7.L, n_embd=make_rwkv7.D, d_ffn=make_rwkv7.F, d_decay=8,
    d_rate=6, d_value=4, d_gate=10, remat="none", dtype="float32",
)  # fmt: skip
needs_rwkv7_hf = pytest.mark.skipif(not parity.installed("torch", "transformers", "rwkv7_hf"), reason="needs rwkv7-hf")
golden = lambda: parity.golden(make_rwkv7, "rwkv7")


def errors(tmp_path, reference):
    return parity.language_model_errors(tmp_path, make_rwkv7, "rwkv7", CFG, reference)


def test_the_golden_file(tmp_path):
    parity.assert_small(errors(tmp_path, golden()))


@needs_rwkv7_hf
def test_rwkv7_hf_itself_and_the_golden_file_is_of_it(tmp_path):
    live = make_rwkv7.oracle("rwkv7")
    parity.assert_small(errors(tmp_path, live))
    parity.assert_golden_is_live(make_rwkv7, "rwkv7", live)


def test_the_comparison_can_fail(tmp_path):
    """A reference that is off by a thousandth is seen."""
    reference = golden()
    name = "grad/model.layers.1.attn.w_lora.lora.2.bias"
    reference[name] = reference[name] * 1.001
    assert errors(tmp_path, reference)["layers/att/w0"] > parity.TOLERANCE


# In a process of its own: when it is imported, the package settles whether it runs RWKV-7 or what came before.
OFFICIAL = """
import os, sys
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1"}  # read at import
import numpy, torch
from rwkv.model import RWKV
file, tokens = sys.argv[1], [int(x) for x in sys.argv[2].split(",")]
logits, state = RWKV(model=file, strategy="cpu fp32").forward(tokens, None, full_output=True)
numpy.savez(file + ".npz", logits=logits.numpy(), **{f"s{i}": x.numpy() for i, x in enumerate(state)})
"""


def params_of_golden_weights():
    theirs = make_rwkv7.weights("rwkv7")
    return rwkv.from_tensors(lambda name, _: theirs[name], CFG, rwkv7.layout_of(CFG), official=False)


@parity.needs_rwkv
def test_the_rwkv_package_on_an_official_checkpoint(tmp_path):
    """Logits and the state behind the last token, of weights that both sides read from one .pth, which we have written."""
    file, tokens = tmp_path / "tiny", make_rwkv7.batch()["tokens"][0]
    rwkv7.save_official(params_of_golden_weights(), CFG, f"{file}.pth")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OFFICIAL, str(file), ",".join(map(str, tokens))]
    subprocess.run(command, check=True, env=env, capture_output=True)
    theirs, params = np.load(f"{file}.npz"), rwkv7.load_params(f"{file}.pth", CFG)
    logits, (first, rest) = logits_and_state(models.build(CFG), params, tokens[None])
    assert quick.relative_error(logits[0], theirs["logits"]) < parity.TOLERANCE
    layers = [first, *(jax.tree.map(lambda x, i=i: x[i], rest) for i in range(CFG.n_layer - 1))]
    for i, layer in enumerate(layers):
        for j, mine in enumerate((layer.att_BxD, layer.s_BxHxNxN, layer.ffn_BxD)):
            assert quick.relative_error(mine[0], theirs[f"s{3 * i + j}"]) < parity.TOLERANCE


@needs_rwkv7_hf
def test_the_recurrence_of_rwkv7_hf():
    """Values and gradients, with states; theirs are keys x values."""
    import torch
    from rwkv7_hf.ops_rwkv7 import rwkv7_recurrent

    random = np.random.RandomState(0)
    r, k, v, kappa, w = (random.normal(0, 1, (2, 35, 2, 16)).astype(np.float32) for _ in range(5))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    g, a = np.float32(-0.6) / (1 + np.exp(-w)), 1 / (1 + np.exp(-w[::-1]))
    arrays = (r, g, 0.3 * k, v, kappa, a, random.normal(0, 1, (2, 2, 16, 16)).astype(np.float32))
    theirs = [torch.tensor(np.ascontiguousarray(x), requires_grad=True) for x in arrays]
    tr, tg, tk, tv, tkappa, ta, ts = theirs
    y, s = rwkv7_recurrent(tr, tg.exp(), tk, tv, -tkappa, tkappa * ta, ts.mT)
    (y.sin().sum() + s.sin().sum()).backward()

    def loss(arrays):
        y, s = wkv7(*arrays[:6], s_BxHxNxN=arrays[6])
        return jnp.sin(y).sum() + jnp.sin(s).sum(), (y, s)

    gradients, (mine_y, mine_s) = quick.jit(jax.grad(loss, has_aux=True))(arrays)
    assert quick.relative_error(mine_y, y.detach()) < parity.TOLERANCE
    assert quick.relative_error(mine_s, s.mT.detach()) < parity.TOLERANCE
    for mine, x in zip(gradients, theirs, strict=True):
        assert quick.relative_error(mine, x.grad) < parity.TOLERANCE
