"""Where arrays live: a mesh (data, fsdp, expert, tensor), and rules from parameter paths to axes. Models know neither."""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvram.errors import UserError
from jaxvram.train.optimizer import path_name

AXES = ("data", "fsdp", "expert", "tensor")
OF_BATCH = ("data", "fsdp", "expert")
BATCH = PartitionSpec(OF_BATCH)  # rows of a batch

# First match wins; searched in the path, so that an optimizer's moments lie where their parameter does. The leading None
# of a stacked matrix is its layer axis. Megatron's split (arXiv:1909.08053): a matrix into a branch by its columns, the
# one back to the residual stream by its rows, tables by vocabulary.
RULES = (
    (r"(^|/)h/.*(c_attn|c_fc)/kernel$", (None, "fsdp", "tensor")),
    (r"(^|/)h/.*c_proj/kernel$", (None, "tensor", "fsdp")),
    (r"(^|/)experts/(gate|up)_proj/kernel$", (None, "expert", "fsdp", "tensor")),
    (r"(^|/)experts/down_proj/kernel$", (None, "expert", "tensor", "fsdp")),
    (r"(^|/)layers/.*(q|k|v|gate|up)_proj/kernel$", (None, "fsdp", "tensor")),
    (r"(^|/)layers/.*(o|down)_proj/kernel$", (None, "tensor", "fsdp")),
    (r"embedding$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # copies of the model, each with its part of the batch; -1: all devices that are left
    fsdp: int = 1  # parts into which parameters and optimizer state are cut; the batch too
    expert: int = 1  # parts among which the experts of a mixture are divided; the batch too
    tensor: int = 1  # parts into which matrix products are cut


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    devices = np.asarray(jax.devices() if devices is None else devices)
    rest = cfg.fsdp * cfg.expert * cfg.tensor
    if min(cfg.fsdp, cfg.expert, cfg.tensor) < 1 or cfg.data == 0 or cfg.data < -1:
        raise UserError("mesh: fsdp, expert and tensor must be at least 1, data at least 1 or -1")
    data = devices.size // rest if cfg.data == -1 else cfg.data
    if data * rest != devices.size:
        raise UserError(
            f"mesh data={cfg.data} x fsdp={cfg.fsdp} x expert={cfg.expert} x tensor={cfg.tensor} does not make "
            f"{devices.size} device(s)"
        )
    return Mesh(devices.reshape(data, cfg.fsdp, cfg.expert, cfg.tensor), AXES)


def check_experts(model_cfg, mesh: Mesh) -> None:
    """Raises a UserError unless the model's experts can be divided evenly among the mesh."""
    parts, experts = mesh.shape["expert"], getattr(model_cfg, "n_expert", 0)
    if parts > 1 and not experts:
        raise UserError(f"mesh.expert={parts}: this model has no experts; set mesh.data or mesh.fsdp instead")
    if experts % parts:
        raise UserError(f"model.n_expert={experts} cannot be divided among mesh.expert={parts} parts")


def shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of arrays or shapes, by RULES; replicated where none matches."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf, mesh)), tree)


def spec(name: str, leaf, mesh: Mesh) -> PartitionSpec:
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
    if len(axes) != len(leaf.shape):  # factored moments share a path with their matrix but not its shape
        return PartitionSpec()
    fits = lambda size, axis: axis is not None and size % mesh.shape[axis] == 0
    return PartitionSpec(*(axis if fits(size, axis) else None for size, axis in zip(leaf.shape, axes, strict=True)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def local_rows(batch_size: int, mesh: Mesh, field: str = "train.batch_size") -> slice:
    """The rows of the global batch that this process feeds to its devices. `field` names the size in an error."""
    parts = math.prod(mesh.shape[axis] for axis in OF_BATCH)
    if batch_size % parts:
        raise UserError(f"{field}={batch_size} is not a multiple of {' x '.join(OF_BATCH)} = {parts} devices")
    rows = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    starts = [index[0].indices(batch_size) for index in rows.values()]
    return slice(min(s[0] for s in starts), max(s[1] for s in starts))


def to_devices(batch, batch_size: int, mesh: Mesh):
    """This process' rows (numpy) as parts of global arrays."""
    sharding = batch_sharding(mesh)
    if math.prod(mesh.devices.shape) == 1:
        return jax.device_put(batch, sharding)
    global_shape = lambda x: (batch_size, *x.shape[1:])
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, global_shape(x)), batch)
