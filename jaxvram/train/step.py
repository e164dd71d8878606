"""The train step of every recipe: microbatches, one division, one optax update, the guard, EMA. Pure; jit it once."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxvram.errors import UserError, nearest
from jaxvram.train import average
from jaxvram.train import stochastic_rounding as rounding
from jaxvram.train.average import DEVICES
from jaxvram.train.guard import Guard, GuardConfig, judge
from jaxvram.train.partition import join


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer updates
    batch_size: int = 8  # sequences or images a step, over all devices
    microbatch_size: int = 0  # of them at a time, gradients added up; 0: all at once
    seed: int = 1337  # of parameters, batches and dropout
    ema_decay: float = 0.0  # of an average of the weights, a step; evaluated and sampled from; 0: none
    ema_every: int = 1  # steps between its updates, with as much of the decay at once
    ema_device: str = "card"  # where it lives: card, 4 bytes a parameter | host, copied to every ema_every steps
    log_every: int = 10  # steps between lines of metrics
    init_from: str = ""  # a folder of weights to start from (Hugging Face layout); empty: at random
    profile_start: int = 0  # first step of a trace in WORKDIR/profile; 0: none
    profile_steps: int = 5
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.log_every, self.profile_steps) < 1:
            raise UserError("train: steps, batch_size, log_every and profile_steps must be at least 1")
        if min(self.microbatch_size, self.profile_start) < 0 or not 0 <= self.ema_decay < 1:
            raise UserError("train: microbatch_size and profile_start must not be negative, ema_decay must be in [0, 1)")
        if self.ema_every < 1:
            raise UserError(f"train.ema_every={self.ema_every} must be at least 1")
        if self.ema_device not in DEVICES:
            raise UserError(f"train.ema_device={self.ema_device!r} is unknown{nearest(self.ema_device, DEVICES)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"train.seed={self.seed} is not in [0, 2^32)")
        if self.microbatch_size and self.batch_size % self.microbatch_size:
            raise UserError(
                f"train.batch_size={self.batch_size} is not a multiple of train.microbatch_size={self.microbatch_size}"
            )

    @property
    def ema_on_host(self) -> bool:
        return self.ema_decay > 0 and self.ema_device == "host"

    @property
    def microbatches(self) -> int:
        return self.batch_size // (self.microbatch_size or self.batch_size)


class TrainState(flax.struct.PyTreeNode):
    """All that a run is; the batch of step n is that of index n + data_offset."""

    step: jax.Array  # int32, batches consumed
    data_offset: jax.Array  # int32, batches jumped over by rollbacks
    params: Any  # those that are trained
    frozen: Any  # the others, {} where all are trained; never changed, in no checkpoint
    opt_state: Any
    ema: Any  # None without, and where it lives on the host
    guard: Guard

    @property
    def eval_params(self):
        """All that the model has, averaged where there is an average."""
        return join(self.params if self.ema is None else self.ema, self.frozen)


def init_params(task, cfg: TrainConfig):
    """The parameters that the seed gives."""
    return task.init(jax.random.fold_in(jax.random.key(cfg.seed), 0))


def init_state(tx, cfg: TrainConfig, params, frozen) -> TrainState:
    """The state before step 0; jit it, so that nothing is made twice."""
    zero = jnp.zeros((), jnp.int32)
    on_card = cfg.ema_decay > 0 and not cfg.ema_on_host
    # In fp32 whatever the weights are: a thousandth of a step is lost in bf16.
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) if on_card else None
    return TrainState(zero, zero, params, frozen, tx.init(params), ema, Guard.fresh(cfg.guard))


def make_train_step(task, tx, schedule, cfg: TrainConfig, stochastic_rounding: bool = False):
    """`(state, batch) -> (state, metrics)`; leaves of batch are (batch_size, ...). Donate the state."""
    stream, of_rounding = (jax.random.fold_in(jax.random.key(cfg.seed), n) for n in (1, 2))

    def train_step(state: TrainState, batch):
        key = jax.random.fold_in(stream, state.step + state.data_offset)
        if getattr(task, "reads_step", False):
            batch = batch | {"step": jnp.full(cfg.batch_size, state.step)}
        loss, grads, metrics = loss_and_gradients(task, state.params, batch, key, cfg.microbatches, state.frozen)
        grad_norm = optax.tree.norm(grads)
        good, guard = judge(state.guard, loss, grad_norm, cfg.guard)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        if stochastic_rounding:
            key = jax.random.fold_in(of_rounding, state.step + state.data_offset)
            params = rounding.apply_updates(state.params, updates, key)
        else:
            params = optax.apply_updates(state.params, updates)
        # Chosen leaf by leaf, so that it melts into the update in place; a cond would keep both.
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
        ema = None if state.ema is None else average.updated(state, params, good, cfg)
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.guard.skipped),
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.longest,  # not of this step alone: not every step is read
        }
        return TrainState(state.step + 1, state.data_offset, params, state.frozen, opt_state, ema, guard), metrics

    return train_step


def loss_and_gradients(task, params, batch, key, microbatches: int = 1, frozen=None):
    """(mean loss, its gradients by `params`, metrics) over the batch: sums are added up and divided once by the weight.

    `task.loss` gives sums, so k microbatches equal one batch however unevenly the targets are masked.
    """

    def loss_fn(params, batch, key):
        loss_sum, weight, metrics = task.loss(join(params, frozen), batch, key)
        return loss_sum, (weight, metrics)

    if microbatches == 1:
        (loss_sum, (weight, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
    else:
        (loss_sum, (weight, metrics)), grads = _summed_over_microbatches(loss_fn, params, batch, key, microbatches)
    weight = jnp.maximum(weight, 1e-9)  # a batch without any target has no gradient, not a NaN
    grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params)
    return loss_sum / weight, grads, {name: value / weight for name, value in metrics.items()}


def _summed_over_microbatches(loss_fn, params, batch, key, microbatches: int):
    """What value_and_grad gives, added up in fp32: a sum of many in bf16 would be off by per cents."""
    # Microbatch j takes the rows j, j + k, ...: with rows spread over devices, each keeps its own.
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)
    xs = jax.tree.map(split, batch), jax.random.split(key, microbatches)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)
    sums = jax.tree.map(jax.new_ref, zeros(params))
    # A gradient of the sum's dtype is added layer by layer, where the sum lies, while the backward pass makes it: there is
    # no second tree of gradients. One in bf16 comes whole and is added then.
    in_place = jax.tree.map(lambda s, p: s if s.dtype == p.dtype else jax.ad.GradValue(), sums, params)

    def add(values, microbatch):
        loss_sum, vjp, aux = jax.vjp(lambda params: loss_fn(params, *microbatch), params, has_aux=True)
        (grads,) = vjp.with_refs(in_place)(jnp.ones_like(loss_sum))
        is_added = lambda grad: isinstance(grad, jax.ad.GradRef)
        jax.tree.map(lambda g, s: None if is_added(g) else s.addupdate(g.astype(s.dtype)), grads, sums, is_leaf=is_added)
        return jax.tree.map(jnp.add, values, (loss_sum, aux)), None

    of_one = jax.eval_shape(loss_fn, params, *jax.tree.map(lambda x: x[0], xs))
    values, _ = jax.lax.scan(add, zeros(of_one), xs)
    return values, jax.tree.map(jax.freeze, sums)
