"""Mamba-2's weights from and to a Hugging Face folder (transformers.Mamba2ForCausalLM)."""

from jaxvram.convert import state_space
from jaxvram.convert.huggingface import HuggingFaceFolder
from jaxvram.convert.state_space import NORM, Parameter, convolution, matrix
from jaxvram.errors import UserError
from jaxvram.models.mamba2 import Mamba2Config

DEFAULTS = {  # what transformers takes for a key that config.json leaves out
    "vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64, "expand": 2, "conv_kernel": 4,
    "head_dim": 64, "num_heads": 128, "n_groups": 8, "tie_word_embeddings": False,
}  # fmt: skip

INFINITE = (float("inf"), {"__float__": "Infinity"})  # the latter is how transformers 5 writes it


def load_params(folder, cfg: Mamba2Config) -> dict:
    """Parameters of `Mamba2(cfg)` as NumPy arrays (the tree inside of "params").

    Raises:
      UserError: the folder is incomplete or damaged, or holds another model than `cfg`; the message names the overrides.
    """
    source = HuggingFaceFolder(folder, "mamba2")
    theirs = DEFAULTS | source.config
    limits = theirs.get("time_step_limit") or (0.0, float("inf"))
    if limits[0] > 0 or limits[1] not in INFINITE:
        raise UserError(f"{source.path / 'config.json'}: time_step_limit={limits} bounds step sizes; not supported")
    state_space.check_config(source, theirs, cfg, "Mamba-2", {"head_dim": "head_dim", "n_groups": "n_groups"})
    if theirs["num_heads"] != cfg.heads:
        which = f"num_heads={theirs['num_heads']} of {cfg.head_dim} do not make {cfg.d_inner} channels"
        raise UserError(f"{source.path / 'config.json'} is damaged: {which}")
    return state_space.load(source, cfg, _layer(cfg), theirs["tie_word_embeddings"])


def save(params, cfg: Mamba2Config, folder) -> None:
    """A folder that `transformers.Mamba2ForCausalLM.from_pretrained` loads, with the same logits.

    Raises:
      UserError: `folder` holds anything but an earlier export, or the disk is full.
    """
    config = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_heads": cfg.heads}
    config |= {"head_dim": cfg.head_dim, "n_groups": cfg.n_groups, "chunk_size": 256}
    state_space.save(params, cfg, _layer(cfg), config, folder)


def _layer(cfg: Mamba2Config) -> list[Parameter]:
    D, E, F, H = cfg.n_embd, cfg.d_inner, cfg.d_conv_in, cfg.heads
    vector = lambda name: Parameter(f"mixer.{name}", ("mixer", name), (H,))
    return [
        Parameter(*NORM, (D,)),
        *convolution(F, cfg.d_conv),
        matrix("in_proj", D, E + F + H),
        matrix("out_proj", E, D),
        Parameter("mixer.norm.weight", ("mixer", "norm", "scale"), (E,)),
        *map(vector, ("dt_bias", "A_log", "D")),
    ]
