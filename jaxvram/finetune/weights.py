"""Weights into an adapted model and out of it, on the host: a matrix is quantised as it is read, merged as it is written.

Nothing here ever holds a second copy of the model: reading needs what the model itself takes and one matrix, merging one
matrix at a time.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxvram.errors import UserError
from jaxvram.finetune import lora
from jaxvram.finetune.adapted import Adapted
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.kernels import nf4

TOKENS = (np.zeros((1, 1), np.int32),)


def base_parameters(model: Adapted, tensors: Iterable, example: tuple = TOKENS) -> dict:
    """The parameters that `tensors` give, in the form that `model` holds them; what it adds is not among them.

    Args:
      tensors: (path, layer, array) as convert/llama.py's `tensors` yields them: the path in the plain model's tree, the
        layer's number or None, matrices as (in, out).
      example: what the model is called with.
    """
    shapes = traverse_util.flatten_dict(_shapes(model, example))
    read = {}

    def put(path, layer, x):
        if path not in read:
            read[path] = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes[path])
        for whole, part in zip(jax.tree.leaves(read[path]), jax.tree.leaves(x), strict=True):
            whole[... if layer is None else layer] = part

    for path, layer, x in tensors:
        name, shape, magnitude = path, x.shape, (*path[:-1], "lora_magnitude")
        if path not in shapes:
            name, x = (*path[:-1], "nf4"), nf4.quantize(x.T, np)  # as they lie in the file, a few rows at a time
        put(name, layer, x)
        if path[-1] == "kernel" and magnitude in shapes:
            put(magnitude, layer, _norm(x, shape, model.cfg.dtype if name != path else shapes[path].dtype))
        del x  # before the next is read
    return traverse_util.unflatten_dict(read)


def _norm(x, shape: tuple[int, int], dtype) -> np.ndarray:
    """|column| of a matrix as it is multiplied with, not as it was read: so DoRA changes nothing at first."""
    if isinstance(x, nf4.NF4):
        return np.asarray(_norm_of_nf4(x, shape, dtype))
    return np.sqrt(np.square(np.asarray(x, dtype).astype(np.float32)).sum(0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _norm_of_nf4(x, shape, dtype):
    return lora.norm(nf4.dequantize(x, shape[::-1], dtype).T)


def one_by_one(params) -> Iterable:
    """Parameters that are read already, as `base_parameters` takes them."""
    for path, x in traverse_util.flatten_dict(params).items():
        if path[-1] == "kernel" and x.ndim == 3:
            yield from ((path, i, layer) for i, layer in enumerate(x))
        else:
            yield path, None, x


def merged(model: Adapted, params, example: tuple = TOKENS) -> dict:
    """The parameters of the plain model, equal to the adapted one: LoRAs added to their matrices, NF4 written out.

    `example`: what the model is called with.

    Raises:
      UserError: the method adds what has no place in a matrix (adapters), or the matrices are ternary.
    """
    method = model.finetune.method
    if method.startswith("adapter"):
        raise UserError(f"finetune.method={method} adds to the attention itself; no plain model equals it")
    shapes, modules = traverse_util.flatten_dict(_shapes(model.model, example)), {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        modules.setdefault(path[:-1], {})[path[-1]] = leaf
    plain = {}
    for path, leaves in modules.items():
        if "lora_A" in leaves and {"packed", "latent"} & leaves.keys():
            raise UserError("a LoRA beside ternary matrices has no place in them; export it by itself: --adapter")
        if {"nf4", "lora_A"} & leaves.keys():
            leaves = _layers_merged(model.finetune, leaves, shapes[*path, "kernel"])
        plain |= {(*path, name): leaf for name, leaf in leaves.items()}
    return traverse_util.unflatten_dict(plain)


def _layers_merged(finetune: FinetuneConfig, leaves: dict, kernel) -> dict:
    """Of one matrix, in every layer where layers are stacked. `kernel`: shape and dtype that it has in the plain model."""
    *layers, D, F = kernel.shape

    @jax.jit
    def of_layer(leaves):
        leaves = dict(leaves)
        if "nf4" in leaves:
            leaves["kernel"] = nf4.dequantize(leaves.pop("nf4"), (F, D), jnp.float32).T
        if "lora_A" in leaves:
            leaves = lora.merge(finetune, leaves)
        return leaves | {"kernel": leaves["kernel"].astype(kernel.dtype)}

    if not layers:
        return jax.device_get(of_layer(leaves))
    made = [jax.device_get(of_layer(jax.tree.map(lambda x, i=i: x[i], leaves))) for i in range(layers[0])]
    return jax.tree.map(lambda *xs: np.stack(xs), *made)


def _shapes(model, example: tuple):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *example)["params"])
