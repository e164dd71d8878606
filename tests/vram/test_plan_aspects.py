"""Pictures of other aspects fit where the square does that the plan is of."""

import jax
import jax.numpy as jnp
import pytest

from jaxvram.data.buckets import shapes, step_of
from jaxvram.models.pixart import PixArt, PixArtConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig, DiffusionTask
from jaxvram.vram.compile import compile_for

CFG = PixArtConfig(
    n_layer=1, n_head=2, n_embd=96, context_dim=64, context_length=8, micro_conditions=True, remat="none", kernels="xla",
    image_size=16, learn_sigma=False,
)  # fmt: skip


@pytest.mark.slow  # machine code of a card
def test_no_aspect_needs_more_than_the_square(rtx4070):
    task = DiffusionTask(PixArt(CFG), None, DiffusionConfig(), DiffusionSampleConfig("ddpm", 2))
    params, spec = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0))), task.batch_spec(8)

    def peak(H, W):
        batch = spec | {"images": jax.ShapeDtypeStruct((8, H, W, CFG.channels), jnp.float32)}
        learn = lambda params, batch: jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0])(params)
        return compile_for(rtx4070, learn, (params, batch)).peak_bytes

    other = shapes(CFG.image_size, step_of(CFG.image_size, CFG.patch_size))[4]
    assert other == (14, 18) and peak(*other) <= 1.01 * peak(CFG.image_size, CFG.image_size)
