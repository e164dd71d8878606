"""The recipe's optimizer as PyTorch users have it, and the running average of the weights."""

import torch
from problems import Refused

EMA_DECAY = 0.9999


def make(fields: dict, parameters: list, variant, device: str, fake: bool):
    """torch's AdamW and Adafactor, transformers' where that has a first moment, bitsandbytes' for 8 bits and for Lion."""
    name, rates = fields["name"], {"lr": fields["learning_rate"]}
    betas = {"betas": (fields.get("b1", 0.9), fields.get("b2", 0.999))}
    if name in ("adafactor", "adafactor_momentum"):
        if variant.eight_bit:
            raise Refused(f"the recipe's optimizer is {name}: 8-bit AdamW would need more memory, not less")
        if name == "adafactor_momentum":
            return _with_first_moment(parameters, rates, fields.get("b1", 0.9))
        return (_FakeAdafactor if fake else torch.optim.Adafactor)(parameters, **rates)
    if name == "lion":
        return _bitsandbytes("Lion8bit" if variant.eight_bit else "Lion", parameters, rates | betas, device, fake)
    if name not in ("adamw", "adamw_8bit"):
        raise Refused(f"no optimizer of PyTorch's is known for {name}")
    betas["eps"] = fields.get("eps", 1e-8)
    if variant.eight_bit or name == "adamw_8bit":
        return _bitsandbytes("AdamW8bit", parameters, rates | betas, device, fake)
    if variant.fused:
        return torch.optim.AdamW(parameters, fused=True, **rates, **betas)
    return torch.optim.AdamW(parameters, foreach=_foreach(device), **rates, **betas)


def _with_first_moment(parameters: list, rates: dict, b1: float):
    """transformers' Adafactor, since torch's has no first moment; its is in fp32, ours in bf16."""
    from transformers.optimization import Adafactor

    return Adafactor(parameters, beta1=b1, scale_parameter=False, relative_step=False, **rates)


class _FakeAdafactor(torch.optim.Adafactor):
    """It reads norms as numbers, which fake tensors have not; no memory hangs on them."""

    def step(self, closure=None):
        from torch._subclasses.fake_tensor import FakeTensor

        read, FakeTensor.item = FakeTensor.item, lambda self: 1.0
        try:
            return super().step(closure)
        finally:
            FakeTensor.item = read


def _foreach(device: str) -> bool:
    """torch's default on a device; it takes fake tensors for a subclass of its own, for which the default is False."""
    return device == "cuda"


def _bitsandbytes(name: str, parameters: list, options: dict, device: str, fake: bool):
    """The true optimizer also on fake tensors: it says there what it makes and writes to.

    That is, for each parameter of 4096 elements or more, an array of uint8 a moment and the largest magnitudes of blocks
    of 256 in fp32; below, fp32; and two tables of 256 entries for all. Only these tables it fills by reading numbers.
    """
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, name)
    if not fake:
        return kind(parameters, **options)

    def fill_qmap(self) -> None:
        self.name2qmap.update({key: torch.empty(256, device=device) for key in ("dynamic", "udynamic")})

    return type(name, (kind,), {"fill_qmap": fill_qmap})(parameters, **options)


def state_of(optimizer) -> list:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


class WeightAverage:
    """A copy in fp32 of what is trained, drawn a little towards it after each step."""

    def __init__(self, parameters: list):
        self.parameters = parameters
        self.copies = [p.detach().to(torch.float32, copy=True) for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        for copy, parameter in zip(self.copies, self.parameters, strict=True):  # one by one: a cast lives for one only
            copy.lerp_(parameter.float(), 1 - EMA_DECAY)
