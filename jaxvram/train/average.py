"""The moving average of the weights that is evaluated and sampled from: beside them on the card, or in the host's memory.

  average += (1 - d^k) (weights - average)   after every k-th step, d = min(train.ema_decay, (1 + n) / (10 + n)) at step n:
the half-life in steps is the same for every k = train.ema_every. On the card it is 4 bytes a parameter, updated within the
step. On the host (train.ema_device=host) those bytes are free: after every k-th step the weights are copied to the host,
for which the card waits, and NumPy averages them beside the next steps, for which it does not. For an evaluation the
average comes onto the card, where at that time no gradients and no activations are.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jaxvram.errors import UserError
from jaxvram.train.partition import join

DEVICES = ("card", "host")


def share(ema_decay: float, every: int, n, xp=jnp):
    """1 - d^k in fp32: how far the average moves after step n, the first of which is 0. It warms up: early weights are
    forgotten soon. `xp`: jnp within a step, np on the host."""
    n = xp.asarray(n, xp.float32)
    return 1 - xp.minimum(xp.float32(ema_decay), (1 + n) / (10 + n)) ** every


def updated(state, params, good, cfg):
    """The average on the card after a step; `good`: that step was not skipped."""
    move = share(cfg.ema_decay, cfg.ema_every, state.step)
    towards = lambda ema: jax.tree.map(lambda e, p: e + move * (p - e), ema, params)
    if cfg.ema_every == 1:
        # Chosen leaf by leaf, so that it melts into the update in place; a cond would keep both.
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), towards(state.ema), state.ema)
    return jax.lax.cond((state.step + 1) % cfg.ema_every == 0, towards, lambda ema: ema, state.ema)


def make_average(cfg, target):
    """Of a TrainConfig and the Program's TrainState of shapes: what a loop asks for its average."""
    return HostAverage(cfg, target) if cfg.ema_on_host else CardAverage()


def with_average(cfg, target):
    """A TrainState of shapes with the average, wherever a run keeps it: as checkpoints hold it, and as it is evaluated."""
    if not cfg.ema_on_host:
        return target
    in_fp32 = lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
    return target.replace(ema=jax.tree.map(in_fp32, target.params))


class CardAverage:
    """The average is a part of the state, or there is none."""

    def begin(self, state):
        """The state to train with, of one that is fresh or comes from a checkpoint."""
        return state

    def after(self, step: int, state) -> None:
        """`step` has been dispatched, and `state` is what comes of it."""

    def saved(self, state):
        """The state as a checkpoint holds it, or a state of shapes as it is to be restored."""
        return state

    def evaluated(self, state):
        """All parameters of the model, averaged where there is an average, on the devices."""
        return state.eval_params


class HostAverage(CardAverage):
    """fp32 NumPy arrays. An update makes new ones: what a checkpoint is still writing is never changed."""

    def __init__(self, cfg, target):
        if jax.process_count() > 1:
            raise UserError("train.ema_device=host is for one process: with several, leave the average on the cards")
        self._cfg, self._homes = cfg, jax.tree.map(lambda s: s.sharding, target.params)
        self._worker, self._tree = ThreadPoolExecutor(1), Future()
        self._skipped = 0  # steps skipped so far, as of the last update

    def begin(self, state):
        tree = _in_fp32(jax.device_get(state.params) if state.ema is None else state.ema)
        self._tree = self._worker.submit(lambda: tree)
        self._skipped = int(state.guard.skipped)
        return state.replace(ema=None)

    def after(self, step, state):
        every = self._cfg.ema_every
        if step % every:
            return
        self._tree.result()  # else copies of the weights would queue up
        skipped = int(state.guard.skipped)  # waits for the step
        bad, self._skipped = skipped > self._skipped, skipped
        if bad and every == 1:  # as on the card
            return
        # Now, since the next step takes over the weights' memory; on a CPU it leaves that to us and takes other.
        before, params = self._tree, jax.device_get(state.params)
        move = share(self._cfg.ema_decay, every, step - 1, np)
        self._tree = self._worker.submit(lambda: _moved(before.result(), params, move))

    def saved(self, state):
        if isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct):
            of_host = lambda s: np.broadcast_to(np.float32(0), s.shape)  # no bytes: tells Orbax where, and of what shape
            return state.replace(ema=jax.tree.map(of_host, state.params))
        return state.replace(ema=self._tree.result())

    def evaluated(self, state):
        return join(jax.tree.map(jax.device_put, self._tree.result(), self._homes), state.frozen)


def _in_fp32(tree):
    return jax.tree.map(lambda x: x.astype(np.float32, copy=False), tree)


def _moved(average, params, move):
    """New arrays: while they are made the host holds 12 bytes a parameter, the average before and after and the weights."""

    def one(e, p):
        new = p.astype(np.float32, copy=False) - e
        new *= move
        new += e
        return new

    return jax.tree.map(one, average, params)
