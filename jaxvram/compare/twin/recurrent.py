"""Twins of recurrent models that transformers has not, or has with a kernel of its own: RetNet, RWKV-7, RWKV-4."""

import contextlib
import functools
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

RANKS = {"d_decay": 2.5, "d_rate": 2.5, "d_value": 1.7, "d_gate": 5.0}  # times sqrt(D): where our config leaves them open


def retnet(f: dict, device: str):
    """(torchscale's decoder in its parallel form, batch of token ids -> loss)."""
    from models import made_in

    with _without_what_it_does_not_need():
        from torchscale.architecture.config import RetNetConfig
        from torchscale.architecture.retnet import RetNetDecoder
    config = RetNetConfig(
        vocab_size=f["vocab_size"], decoder_embed_dim=f["n_embd"], decoder_layers=f["n_layer"],
        decoder_retention_heads=f["n_head"], decoder_value_embed_dim=f["d_value"], decoder_ffn_embed_dim=f["n_inner"],
        activation_fn=f["activation"], no_scale_embedding=not f["scale_embedding"], layernorm_eps=f["norm_eps"],
        share_decoder_input_output_embed=f["tie_head"],
    )  # fmt: skip
    with made_in(f["param_dtype"], device):
        model = RetNetDecoder(config, embed_tokens=torch.nn.Embedding(f["vocab_size"], f["n_embd"]))

    def loss(ids):
        return F.cross_entropy(model(ids)[0].view(-1, f["vocab_size"]).float(), ids.view(-1))  # fairseq's, in fp32

    return model, loss


def checkpoint_layers(model) -> None:
    """What fairscale's wrapper does for torchscale: each layer is run again in the backward pass."""
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


@contextlib.contextmanager
def _without_what_it_does_not_need():
    """torchscale imports timm and fairscale for layers that RetNet has not."""
    wanted = ("timm", "timm.models", "timm.models.layers", "fairscale", "fairscale.nn")
    missing = [name for name in wanted if importlib.util.find_spec(name.partition(".")[0]) is None]
    modules = {name: types.ModuleType(name) for name in missing}
    for name, needed in (("timm.models.layers", ("drop_path",)), ("fairscale.nn", ("checkpoint_wrapper", "wrap"))):
        for attribute in needed if name in modules else ():
            setattr(modules[name], attribute, None)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def rwkv7(f: dict):
    """(config, class) of rwkv7_hf."""
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    D = f["n_embd"]
    ranks = {name: f[name] or max(32, round(times * D**0.5 / 32) * 32) for name, times in RANKS.items()}
    config = RWKV7Config(
        vocab_size=f["vocab_size"], hidden_size=D, num_hidden_layers=f["n_layer"], head_dim=f["head_dim"],
        num_heads=D // f["head_dim"], intermediate_size=f["d_ffn"] or 4 * D, decay_low_rank_dim=ranks["d_decay"],
        a_low_rank_dim=ranks["d_rate"], v_low_rank_dim=ranks["d_value"], gate_low_rank_dim=ranks["d_gate"],
    )  # fmt: skip
    return config, RWKV7ForCausalLM


def rwkv7_loss(model, ids):
    """As rwkv7_hf's own, but for its look whether any label counts: fake tensors have no numbers to look at."""
    logits = model(input_ids=ids).logits
    shifted, labels = logits[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]).float(), labels.reshape(-1))
