"""Mamba's weights from and to a Hugging Face folder (transformers.MambaForCausalLM)."""

import math

from jaxvram.convert import state_space
from jaxvram.convert.huggingface import HuggingFaceFolder
from jaxvram.convert.state_space import NORM, Parameter, convolution, matrix
from jaxvram.models.mamba import MambaConfig

DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "expand": 2, "conv_kernel": 4,
    "time_step_rank": "auto", "tie_word_embeddings": True,
}  # fmt: skip


def load_params(folder, cfg: MambaConfig) -> dict:
    """Parameters of `Mamba(cfg)` as NumPy arrays (the tree inside of "params").

    Raises:
      UserError: the folder is incomplete or damaged, or holds another model than `cfg`; the message names the overrides.
    """
    source = HuggingFaceFolder(folder, "mamba")
    theirs = DEFAULTS | source.config
    if theirs["time_step_rank"] == "auto":
        theirs["time_step_rank"] = math.ceil(theirs["hidden_size"] / 16)
    sizes = {"dt_rank": "time_step_rank"} if cfg.rank != theirs["time_step_rank"] else {}  # dt_rank=0 is D / 16
    state_space.check_config(source, theirs, cfg, "Mamba", sizes, {"time_step_scale": (1.0, 1)})
    return state_space.load(source, cfg, _layer(cfg), theirs["tie_word_embeddings"])


def save(params, cfg: MambaConfig, folder) -> None:
    """A folder that `transformers.MambaForCausalLM.from_pretrained` loads, with the same logits.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "time_step_rank": cfg.rank}
    config["intermediate_size"] = cfg.d_inner
    state_space.save(params, cfg, _layer(cfg), config, folder)


def _layer(cfg: MambaConfig) -> list[Parameter]:
    D, E, N, R = cfg.n_embd, cfg.d_inner, cfg.d_state, cfg.rank
    return [
        Parameter(*NORM, (D,)),
        *convolution(E, cfg.d_conv),
        matrix("in_proj", D, 2 * E),
        matrix("x_proj", E, R + 2 * N),
        matrix("dt_proj", R, E),
        matrix("out_proj", E, D),
        Parameter("mixer.dt_proj.bias", ("mixer", "dt_bias"), (E,)),
        Parameter("mixer.A_log", ("mixer", "A_log"), (E, N)),
        Parameter("mixer.D", ("mixer", "D"), (E,)),
    ]
