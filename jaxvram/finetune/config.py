"""How a model is fine-tuned: what is added to it, what of it is trained, and in which form the rest is held."""

import dataclasses
import re

from jaxvram.errors import UserError, nearest

METHODS = ("none", "lora", "adapter", "adapter_v2", "router")
ALL_LINEAR = r".*(attn|mlp)/.*"

# What each method trains, by the whole path of a parameter
TRAINED = {
    "none": r".*",
    "router": r".*/router/.*",
    "lora": r".*/lora_(A|B|magnitude)",
    "adapter": r".*/adapter_(prompt|gate)",
    "adapter_v2": r".*/adapter_(prompt|gate|scale|bias)|(.*/)?\w*norm\w*/scale",
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    method: str = "none"  # none (every parameter is trained) | lora | adapter, adapter_v2 (LLaMA-Adapter) | router
    base: str = "plain"  # frozen matrices: plain (in model.param_dtype) | nf4 (QLoRA: 4.13 bits a weight)
    rank: int = 16  # lora: r, columns of A and rows of B
    alpha: float = 32.0  # lora: the product is scaled by alpha / r
    rank_stabilised: bool = False  # lora: by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732)
    dropout: float = 0.0  # lora: of what A reads
    dora: bool = False  # lora: directions by A and B, magnitudes of their own (Liu et al. 2024, arXiv:2402.09353)
    targets: str = ALL_LINEAR  # lora: regex that must match a matrix' whole path, e.g. '.*(q_proj|v_proj)'
    prompt_length: int = 10  # adapter: learnt prompts a layer
    first_layer: int = 2  # adapter: layers before it have none
    adapter_from: str = ""  # a folder of peft's to start from; empty: as new
    gate: str = "head"  # adapter: a gate for each head (LitGPT) | one a layer (layer; peft)

    def __post_init__(self):
        for field, valid in (("method", METHODS), ("base", ("plain", "nf4")), ("gate", ("head", "layer"))):
            if (value := getattr(self, field)) not in valid:
                raise UserError(f"finetune.{field}={value!r} is unknown{nearest(value, valid)}")
        if self.base == "nf4" and self.method not in ("lora", "adapter"):
            raise UserError(f"finetune.base=nf4 is not trained: finetune.method={self.method} must be lora or adapter")
        if self.adapter_from and not self.is_pefts:
            raise UserError(
                f"finetune.adapter_from={self.adapter_from} is a folder of peft's: set finetune.method=lora, or adapter "
                f"with finetune.gate=layer (here: {self.method} with {self.gate})"
            )
        if min(self.rank, self.prompt_length) < 1 or self.first_layer < 0:
            raise UserError("finetune: rank and prompt_length must be at least 1, first_layer must not be negative")
        if not 0 <= self.dropout < 1:
            raise UserError(f"finetune.dropout={self.dropout} is not in [0, 1)")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"finetune.targets={self.targets!r} is no regular expression: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def is_pefts(self) -> bool:
        """Does peft know it? Of LLaMA-Adapter it has the first version, with a gate for each layer."""
        return self.method == "lora" or (self.method == "adapter" and self.gate == "layer")

    @property
    def adds(self) -> bool:
        """Has the model what it had not before?"""
        return self.method not in ("none", "router")

    def trains(self, path: str) -> bool:
        """Is the parameter of that path trained?"""
        return re.fullmatch(TRAINED[self.method], path) is not None

    def is_target(self, path: str) -> bool:
        """Does the matrix of that path get a LoRA?"""
        return self.method == "lora" and re.fullmatch(self.targets, path) is not None
