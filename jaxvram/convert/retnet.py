"""RetNet's weights from and to torchscale's names (RetNetDecoder's state_dict), with its configuration as config.json.

torchscale publishes no checkpoints, and writes what fairseq writes: a pickle. The folder holds model.safetensors instead,
with the names of `RetNetDecoder.state_dict()` (fairseq's begin with "decoder."), and config.json the fields of RetNetConfig.
"""

import numpy as np

from jaxvram.convert import state_space
from jaxvram.convert.huggingface import HuggingFaceFolder, write_folder
from jaxvram.convert.state_space import Frame, Parameter
from jaxvram.errors import UserError
from jaxvram.kernels.retention import log_gammas
from jaxvram.models.retnet import RetNetConfig

FRAME = Frame("decoder.", "embed_tokens.weight", "layer_norm.weight", "output_projection.weight")
DEFAULTS = {  # what torchscale takes for a key that config.json leaves out
    "decoder_embed_dim": 768, "decoder_value_embed_dim": 1280, "decoder_retention_heads": 3, "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12, "vocab_size": -1, "activation_fn": "gelu", "no_scale_embedding": True, "layernorm_eps": 1e-6,
    "share_decoder_input_output_embed": False,
}  # fmt: skip
SIZE_OF = {
    "vocab_size": "vocab_size", "n_embd": "decoder_embed_dim", "n_layer": "decoder_layers",
    "n_head": "decoder_retention_heads", "d_value": "decoder_value_embed_dim", "n_inner": "decoder_ffn_embed_dim",
}  # fmt: skip
FIXED = {
    "deepnorm": (False,), "decoder_normalize_before": (True,), "layernorm_embedding": (False,), "moe_freq": (0,),
    "multiway": (False,),
}  # fmt: skip
DECAY = "retnet_rel_pos.decay"


def load_params(folder, cfg: RetNetConfig) -> dict:
    """Parameters of `RetNet(cfg)` as NumPy arrays (the tree inside of "params").

    Raises:
      UserError: the folder is incomplete or damaged, or holds another model than `cfg`; the message names the overrides.
    """
    source = HuggingFaceFolder(folder, "retnet")
    theirs = DEFAULTS | source.config
    source.check_sizes(theirs, SIZE_OF.values())
    source.check_fixed(theirs, FIXED, "RetNet of ours")
    wanted = {ours: theirs[key] for ours, key in SIZE_OF.items()}
    wanted |= {"activation": theirs["activation_fn"], "scale_embedding": not theirs["no_scale_embedding"]}
    wanted["norm_eps"] = theirs["layernorm_eps"]
    tied = theirs["share_decoder_input_output_embed"]
    if cfg.tie_head and not tied:
        wanted["tie_head"] = False
    source.check_fields(wanted, cfg)
    for name in {DECAY, f"decoder.{DECAY}"} & set(source.names):
        if not np.allclose(source.tensor(name, (cfg.n_head,)), log_gammas(cfg.n_head), rtol=1e-3):
            raise UserError(f"{source.path} has decays ({name}) of its own; ours are log(1 - 2^(-5 - h))")
    return state_space.load(source, cfg, _layer(cfg), tied, FRAME)


def save(params, cfg: RetNetConfig, folder) -> None:
    """A folder whose tensors `torchscale.architecture.retnet.RetNetDecoder` loads, with the same logits.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    tensors = state_space.tensors(params, cfg, _layer(cfg), FRAME._replace(prefix=""))
    tensors |= {DECAY: log_gammas(cfg.n_head), "retnet_rel_pos.angle": np.repeat(cfg.rope_frequencies, 2)}
    if cfg.tie_head:
        tensors[FRAME.head] = tensors[FRAME.table]
    config = {theirs: getattr(cfg, ours) for ours, theirs in SIZE_OF.items()}
    config |= {"activation_fn": cfg.activation, "no_scale_embedding": not cfg.scale_embedding, "model_type": "retnet"}
    config |= {"layernorm_eps": cfg.norm_eps, "share_decoder_input_output_embed": cfg.tie_head}
    write_folder(folder, config, tensors)


def _layer(cfg: RetNetConfig) -> list[Parameter]:
    D, E, F = cfg.n_embd, cfg.d_value, cfg.n_inner
    shapes = {"retention.q_proj": (D, D), "retention.k_proj": (D, D), "retention.v_proj": (E, D), "retention.g_proj": (E, D),
              "retention.out_proj": (D, E), "ffn.fc1": (F, D), "ffn.gate": (F, D), "ffn.fc2": (D, F)}  # fmt: skip
    matrices = [
        Parameter(f"{name}.weight", (*name.split("."), "kernel"), shape, is_matrix=True) for name, shape in shapes.items()
    ]
    norms = ("retention_layer_norm", "final_layer_norm")
    return [*matrices, *(Parameter(f"{name}.weight", (name, "scale"), (D,)) for name in norms)]
