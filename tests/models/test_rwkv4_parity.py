"""RWKV-4 equals transformers' (logits, loss, every gradient; golden file always, live if there) and the `rwkv` package."""

import golden_file
import jax
import make_rwkv4
import parity
import quick
from recurrent import logits_and_state

from jaxvram import models
from jaxvram.convert import rwkv, rwkv4
from jaxvram.models.rwkv4 import RWKV4Config

CFG = RWKV4Config(
    vocab_size=make_rwkv4.V, vocab_multiple=16, n_layer=make_rwkv4.L, n_embd=make_rwkv4.D, d_ffn=make_rwkv4.F,
    remat="none", dtype="float32",
)  # fmt: skip
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


def official_weights():
    """The golden file's weights by their official names and shapes, as a .pth has them."""
    theirs, layout = make_rwkv4.weights("rwkv4"), rwkv4.layout_of(CFG)
    params = rwkv.from_tensors(lambda name, _: theirs[name], CFG, layout, official=False)
    return rwkv.to_tensors(params, CFG, layout, official=True)


@parity.needs_rwkv
def test_the_rwkv_package_on_an_official_checkpoint(tmp_path):
    """Logits and the state behind the last token, of weights that both sides read from one .pth."""
    import torch

    file, tokens = tmp_path / "tiny.pth", make_rwkv4.batch()["tokens"][0]
    torch.save({name: torch.tensor(x) for name, x in official_weights().items()}, file)
    their_logits, theirs = golden_file.rwkv_forward(file, tokens)
    logits, state = logits_and_state(models.build(CFG), rwkv4.load_params(file, CFG), tokens[None])
    assert quick.relative_error(logits[0], their_logits) < parity.TOLERANCE
    for i in range(CFG.n_layer):
        layer = jax.tree.map(lambda x, i=i: x[i, 0], state)
        for j, mine in enumerate((layer.att_BxD, *layer.s_Bx3xD, layer.ffn_BxD)):
            assert quick.relative_error(mine, theirs[5 * i + j]) < parity.TOLERANCE
