"""Skips a step whose loss or gradient norm is not finite or far out of the recent window (llm.c's -sl and -sg)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxvram.errors import UserError

# With small batches a gradient norm is now and then eight deviations out in a healthy run (once in nanoGPT's 2,000 steps
# on Shakespeare); that much clipping deals with. Three times the mean it must be as well.
CLIPPED = 3.0


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    window: int = 128  # steps that count as recent; nothing is an outlier before it is full
    z_score: float = 8.0  # deviations above the window's mean that count as far out; 0: only non-finite steps are skipped
    patience: int = 8  # skipped steps in a row before the run goes back to its last checkpoint
    max_rollbacks: int = 3  # before the run gives up

    def __post_init__(self):
        if min(self.window, self.patience) < 1 or min(self.z_score, self.max_rollbacks) < 0:
            raise UserError(
                "train.guard: window and patience must be at least 1, z_score and max_rollbacks must not be negative"
            )


class Guard(flax.struct.PyTreeNode):
    """What the guard remembers: loss and gradient norm of the last good steps, and how many were skipped."""

    recent_Wx2: jax.Array  # fp32, a ring
    seen: jax.Array  # int32, good steps so far
    streak: jax.Array  # int32, skipped steps in a row
    longest: jax.Array  # int32, the longest streak since the run began or was set back
    skipped: jax.Array  # int32, in all

    def set_back(self) -> "Guard":
        """After a rollback: the streak that led to it is over."""
        return self.replace(streak=self.streak * 0, longest=self.longest * 0)

    @classmethod
    def fresh(cls, cfg: GuardConfig) -> "Guard":
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros((cfg.window, 2), jnp.float32), zero, zero, zero, zero)


def judge(guard: Guard, loss, grad_norm, cfg: GuardConfig):
    """(is this step good?, the guard after it). What is skipped is not remembered: two outliers would excuse a third."""
    now_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    good = jnp.isfinite(now_2).all()
    if cfg.z_score > 0:
        mean_2, std_2 = guard.recent_Wx2.mean(0), guard.recent_Wx2.std(0)
        bound_2 = mean_2 + cfg.z_score * std_2
        far_out = (now_2 > bound_2.at[1].max(CLIPPED * mean_2[1])).any()
        good &= ~((guard.seen >= cfg.window) & far_out)
    ring = guard.recent_Wx2.at[guard.seen % cfg.window].set(now_2)
    streak = jnp.where(good, 0, guard.streak + 1)
    return good, Guard(
        recent_Wx2=jnp.where(good, ring, guard.recent_Wx2),
        seen=guard.seen + good,
        streak=streak,
        longest=jnp.maximum(guard.longest, streak),
        skipped=guard.skipped + ~good,
    )
