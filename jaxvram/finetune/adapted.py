"""A model with what its fine-tuning adds, and its frozen matrices in fewer bits. The model itself knows nothing of it.

Flax lets calls of modules be intercepted: every matrix of a model is a Linear, and what a method does, it does to a Linear
or to an attention as it is called. What it adds are parameters of that very module, so that they are stacked by layers,
sliced, saved and sharded as its own.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from jaxvram.errors import UserError
from jaxvram.finetune import llama_adapter, lora
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.kernels import nf4
from jaxvram.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class Adapted:
    """To tasks a model like any other: `init`, `apply`, `cfg`, `context`."""

    model: nn.Module
    finetune: FinetuneConfig

    @property
    def cfg(self):
        return self.model.cfg

    @property
    def context(self):
        return self.model.context

    def init(self, key, *args, **kwargs):
        """The model's parameters with those that are added.

        Raises:
          UserError: finetune.targets matches no matrix, a rank exceeds one, or the model's attention takes no adapter.
        """
        seen = []
        with nn.intercept_methods(functools.partial(_intercept, self.finetune, seen)):
            variables = self.model.init(key, *args, **kwargs)
        method = self.finetune.method
        paths = ["/".join(path) for path in traverse_util.flatten_dict(variables["params"])]
        if method == "lora" and not any(path.endswith("lora_A") for path in paths):
            which = f"finetune.targets={self.finetune.targets!r} matches no matrix"
            raise UserError(f"{which}; there are {', '.join(sorted(set(seen)))}")
        if method.startswith("adapter"):
            if not any(path.endswith("adapter_gate") for path in paths):
                raise UserError(f"finetune.method={method} needs a Llama; this model has no attention that takes prompts")
            variables = {**variables, "params": self._as_adapters_want(variables["params"])}
        return variables

    def _as_adapters_want(self, params):
        """Without prompts in the first layers; norms that are trained in fp32, where small steps are not rounded away."""

        def of_leaf(path, x_L):
            if path[-1] == "adapter_active":
                return (jnp.arange(len(x_L)) >= self.finetune.first_layer).astype(jnp.float32)
            return x_L.astype(jnp.float32) if self.finetune.trains("/".join(path)) else x_L

        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict({path: of_leaf(path, x) for path, x in flat.items()})

    def apply(self, *args, **kwargs):
        with nn.intercept_methods(functools.partial(_intercept, self.finetune, [])):
            return self.model.apply(*args, **kwargs)


def adapted(model, finetune: FinetuneConfig):
    """The model as `finetune` wants it; itself where nothing is added.

    Raises:
      UserError: `finetune` is for other models: not for ternary matrices, or for a mixture's routers alone.
    """
    ternary = getattr(model.cfg, "weights", None)
    if ternary and (finetune.base == "nf4" or finetune.dora):
        raise UserError("a BitNet's matrices are ternary: finetune.base=nf4 and finetune.dora are for a Llama's")
    if finetune.method == "none" and ternary not in (None, "latent"):
        which = f"model.weights={ternary} are packed, and not trained"
        raise UserError(f"{which}: set finetune.method=lora, or model.weights=latent")
    if finetune.method == "router" and not hasattr(model.cfg, "n_expert"):
        raise UserError("finetune.method=router trains the routers of a mixture of experts; this model has none")
    return Adapted(model, finetune) if finetune.adds else model


def _intercept(cfg: FinetuneConfig, seen: list, call, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, Linear) and method == "__call__":
        seen.append("/".join(module.path))
        return _linear(cfg, module, call, *args)
    y = call(*args, **kwargs)
    if cfg.method.startswith("adapter") and method == "attend":
        return llama_adapter.attend(cfg, module, args[0], y)
    return y


def _linear(cfg: FinetuneConfig, module, call, x_xD):
    D, F = x_xD.shape[-1], module.features
    if cfg.base == "nf4":
        weight = module.param("nf4", lambda key: nf4.quantize(module.kernel_init(key, (D, F), jnp.float32).T))
        y_xF = nf4.nf4_linear(x_xD.astype(module.dtype), weight, F)
        if module.use_bias:
            y_xF += module.param("bias", module.bias_init, (F,), module.param_dtype).astype(y_xF.dtype)
        kernel_DxF = lambda: nf4.dequantize(weight, (F, D), module.dtype).T
    else:
        y_xF, kernel_DxF = call(x_xD), lambda: module.get_variable("params", "kernel")
    if cfg.is_target("/".join(module.path)):
        y_xF = lora.add(cfg, module, x_xD, y_xF, kernel_DxF)
    return llama_adapter.rescale(module, y_xF) if cfg.method == "adapter_v2" else y_xF


