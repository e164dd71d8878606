"""The request: what must be in it, and which variants there are."""

import dataclasses
import os

from problems import Refused, TwinError

OF_IMAGES = ("autoencoder", "dit", "pixart", "unet")  # of diffusers
KINDS = ("gpt2", "llama", "bitnet", "moe", "mamba", "mamba2", "retnet", "rwkv4", "rwkv7", *OF_IMAGES)
WAYS = ("planned", "measured")


@dataclasses.dataclass(frozen=True)
class Variant:
    flash: bool = False  # scaled_dot_product_attention by a flash kernel; else the library's own "eager" attention
    checkpoint: bool = False  # every block's activations are computed again in the backward pass
    eight_bit: bool = False  # bitsandbytes' optimizer
    fused: bool = True  # torch's optimizer in one kernel; else as it comes by default
    compiled: bool = False  # torch.compile


VARIANTS = {
    "eager": Variant(fused=False),
    "flash": Variant(flash=True),
    "flash+checkpoint": Variant(flash=True, checkpoint=True),
    "flash+checkpoint+8bit": Variant(flash=True, checkpoint=True, eight_bit=True),
    "checkpoint": Variant(checkpoint=True),  # these two are for models without attention that flash kernels take
    "checkpoint+8bit": Variant(checkpoint=True, eight_bit=True),
    "compile": Variant(flash=True, compiled=True),
}
NO_FLASH = {  # model.kind -> variants that it has in place of those with flash attention
    kind: {"flash": "eager", "flash+checkpoint": "checkpoint", "flash+checkpoint+8bit": "checkpoint+8bit"}
    for kind in ("mamba", "mamba2", "retnet", "rwkv4", "rwkv7", "autoencoder")
}


@dataclasses.dataclass(frozen=True)
class Step:
    batch_size: int
    microbatch_size: int  # 0: the whole batch at once
    optimizer: dict  # name, learning_rate, b1, b2, eps, clip_norm
    ema: bool

    @property
    def rows(self) -> int:
        """Of a microbatch."""
        return self.microbatch_size or self.batch_size


@dataclasses.dataclass(frozen=True)
class Request:
    way: str  # planned | measured
    device: str  # cuda | cpu
    model: dict  # kind, and the fields of our config
    finetune: dict | None
    step: Step
    variants: tuple[str, ...]
    warm_up: int
    timed: int


def parse(raw) -> Request:
    """Raises TwinError with a line that names what is wrong and what would be right."""
    if not isinstance(raw, dict):
        raise TwinError("the request must be a JSON object")
    raw = {"device": "cuda", "finetune": None, "warm_up": 3, "timed": 10} | raw
    if missing := {"way", "model", "step", "variants"} - raw.keys():
        raise TwinError(f"the request lacks {', '.join(sorted(missing))}")
    _one_of("way", raw["way"], WAYS)
    _one_of("device", raw["device"], ("cuda", "cpu"))
    _one_of("model.kind", raw["model"].get("kind"), KINDS)
    for name in raw["variants"]:
        _one_of("variants", name, VARIANTS)
    names = {field.name for field in dataclasses.fields(Step)}
    if raw["step"].keys() != names:
        raise TwinError(f"step must have exactly the fields {', '.join(sorted(names))}")
    step = Step(**raw["step"])
    if step.batch_size < 1 or step.batch_size % step.rows:
        raise TwinError(f"step.microbatch_size={step.microbatch_size} does not divide batch_size={step.batch_size}")
    if min(raw["warm_up"], raw["timed"]) < 1:
        raise TwinError("warm_up and timed must be at least 1: the first step makes the optimizer's state")
    if "name" not in step.optimizer:
        raise TwinError("step.optimizer has no name")
    finetune = raw["finetune"]
    if finetune and finetune.get("method") == "none":
        finetune = None  # every parameter is trained
    kind = {"router": "moe"}.get(finetune["method"], "llama") if finetune else raw["model"]["kind"]
    if kind != raw["model"]["kind"]:
        raise TwinError(f"such a finetune is for model.kind={kind}, and here it is {raw['model']['kind']}")
    names = ("way", "device", "model", "warm_up", "timed")
    return Request(finetune=finetune, step=step, variants=tuple(raw["variants"]), **{name: raw[name] for name in names})


def check_variant(request: Request, name: str) -> None:
    """Raises Refused for a variant that this model does not have, or this way cannot tell of."""
    kind = request.model["kind"]
    if name in NO_FLASH.get(kind, {}):
        raise Refused(f"{kind} has no attention that flash kernels take: see {NO_FLASH[kind][name]}")
    if name == "compile" and request.way == "planned":
        raise Refused("what torch.compile keeps is known only to its compiler, which needs the card: measure it")
    if name == "compile" and os.environ.get("TORCHDYNAMO_DISABLE", "0") != "0":
        raise Refused("TORCHDYNAMO_DISABLE is set, with which torch.compile does nothing")


def _one_of(field: str, value, valid) -> None:
    if value not in valid:
        raise TwinError(f"{field}={value!r} is unknown (valid: {', '.join(valid)})")
