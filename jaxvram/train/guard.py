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
    patience: int = 8  # steps in a row with a loss far out or not finite before the run goes back to its last checkpoint
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
    borne: jax.Array  # int32, steps that were skipped for their norm alone
    streak: jax.Array  # int32, steps in a row that were skipped for their loss, or were not finite
    longest: jax.Array  # int32, the longest streak since the run began or was set back
    skipped: jax.Array  # int32, in all

    def set_back(self) -> "Guard":
        """After a rollback: the streak that led to it is over."""
        return self.replace(streak=self.streak * 0, longest=self.longest * 0)

    @classmethod
    def fresh(cls, cfg: GuardConfig) -> "Guard":
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros((cfg.window, 2), jnp.float32), zero, zero, zero, zero, zero)


def judge(guard: Guard, loss, grad_norm, cfg: GuardConfig):
    """(is this step good?, the guard after it).

    A loss that is far out is not remembered: two outliers would excuse a third, and a divergence would be trained on. A
    norm that is far out while the loss is not is remembered as what was just bearable, and counts as no part of a streak:
    where it lasts, a model has begun to learn something, and the bound follows it within ten to thirty steps.
    """
    now_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite = jnp.isfinite(now_2).all()
    lost = far_out = ~finite
    if cfg.z_score > 0:
        mean_2, std_2 = guard.recent_Wx2.mean(0), guard.recent_Wx2.std(0)
        bound_2 = mean_2 + cfg.z_score * std_2
        bound_2 = bound_2.at[1].max(CLIPPED * mean_2[1])
        beyond_2 = (now_2 > bound_2) & (guard.seen >= cfg.window)
        lost, far_out = lost | beyond_2[0], far_out | beyond_2.any()
        now_2 = jnp.where(beyond_2, bound_2, now_2)
    good = ~far_out
    ring = guard.recent_Wx2.at[(guard.seen + guard.borne) % cfg.window].set(now_2)
    streak = jnp.where(lost, guard.streak + 1, 0)
    return good, Guard(
        recent_Wx2=jnp.where(lost, guard.recent_Wx2, ring),
        seen=guard.seen + good,
        borne=guard.borne + (far_out & ~lost),
        streak=streak,
        longest=jnp.maximum(guard.longest, streak),
        skipped=guard.skipped + far_out,
    )
