"""One file per architecture. A model's configuration says which model it is."""

from jaxvram.models.autoencoder import AutoencoderConfig, AutoencoderKL
from jaxvram.models.bitnet import BitNet, BitNetConfig
from jaxvram.models.dit import DiT, DiTConfig
from jaxvram.models.gpt2 import GPT2, GPT2Config
from jaxvram.models.llama import Llama, LlamaConfig
from jaxvram.models.mamba import Mamba, MambaConfig
from jaxvram.models.mamba2 import Mamba2, Mamba2Config
from jaxvram.models.moe import MoE, MoEConfig
from jaxvram.models.pixart import PixArt, PixArtConfig
from jaxvram.models.retnet import RetNet, RetNetConfig
from jaxvram.models.rwkv4 import RWKV4, RWKV4Config
from jaxvram.models.rwkv5 import RWKV5, RWKV5Config
from jaxvram.models.rwkv6 import RWKV6, RWKV6Config
from jaxvram.models.rwkv7 import RWKV7, RWKV7Config
from jaxvram.models.unet import UNet, UNetConfig

MODELS = {
    "gpt2": (GPT2, GPT2Config),
    "dit": (DiT, DiTConfig),
    "pixart": (PixArt, PixArtConfig),
    "unet": (UNet, UNetConfig),
    "autoencoder": (AutoencoderKL, AutoencoderConfig),
    "llama": (Llama, LlamaConfig),
    "bitnet": (BitNet, BitNetConfig),
    "mamba": (Mamba, MambaConfig),
    "mamba2": (Mamba2, Mamba2Config),
    "moe": (MoE, MoEConfig),
    "retnet": (RetNet, RetNetConfig),
    "rwkv4": (RWKV4, RWKV4Config),
    "rwkv5": (RWKV5, RWKV5Config),
    "rwkv6": (RWKV6, RWKV6Config),
    "rwkv7": (RWKV7, RWKV7Config),
}


def name_of(cfg) -> str:
    """The name of the model that a configuration is of."""
    return next(name for name, (_, config_type) in MODELS.items() if type(cfg) is config_type)


def build(cfg):
    """The module of a configuration."""
    return MODELS[name_of(cfg)][0](cfg)
