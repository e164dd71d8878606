"""DiT, class-conditional diffusion transformers (Peebles & Xie 2023), on latents of 256 px images or on small images.

  python launch.py --config=configs/dit.py                                # b2 where there is a GPU, else tiny
  python launch.py --config=configs/dit.py:b2 --config.data.path=LATENTS  # what --mode=prepare wrote (docs/dit.md)
  python launch.py --config=configs/dit.py:shapes
  python launch.py --config=configs/dit.py:xl2 --mode=plan --card=rtx4070

  variant  parameters  card      time            planned peak  what to expect
  b2         130 M     RTX 4070  9 days          3.4 GiB       FID-50K 43.5 without guidance after 400,000 steps (paper)
  s2          33 M     RTX 4070  3 days          1.1 GiB       68.4, likewise
  l2         458 M     RTX 4070  8 days          10.0 GiB      not published for batches of 64 (at 256: 23.3)
  xl2        675 M     RTX 4070  6 days          9.8 GiB       not published for batches of 32 (at 256: 19.5)
  digits     1.2 M     2 cores   10 minutes      0.1 GiB       the classifier takes all samples for the digit asked for
  shapes     1.2 M     2 cores   7 minutes       0.1 GiB       97 % of samples have the colour and the shape asked for
  tiny       1.2 M     2 cores   4 minutes       0.1 GiB       the same, by rectified flow; loss from 2 to 0.4

Times on a GPU are arithmetic, not measurements: 400,000 steps, four forward passes' FLOPs a step, at 40 % of the card's 58
TFLOP/s. What makes l2 and xl2 fit is said beside their fields; each takes its whole batch at once.
"""

from jaxvram import recipe
from jaxvram.data.images import ImageDataConfig
from jaxvram.models.dit import SIZES, DiTConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("b2", "s2", "l2", "xl2", "digits", "shapes", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=DiTConfig.of_size("B/2"),  # 32 x 32 x 4 latents, 1000 classes, learned variance
        task=DiffusionConfig(),
        data=ImageDataConfig(name="latents", flip=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", b2=0.999, clip_norm=0.0, groups={"all": ParamGroup(r".*")}
        ),
        train=TrainConfig(steps=400_000, batch_size=256, microbatch_size=64, ema_decay=0.9999, log_every=50),
        eval=EvalConfig(every=10_000, batches=20),
        sample=DiffusionSampleConfig(sampler="ddpm", steps=250, guidance=4.0, num_samples=16),
        checkpoint=CheckpointConfig(every=5_000),
    )
    if variant in ("s2", "l2", "xl2"):
        n_layer, n_head, n_embd = SIZES[variant[:-1].upper()]
        c.model.update(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    if variant == "l2":  # a second set of gradients, to add up microbatches, has no room
        c.train.update(batch_size=64, microbatch_size=0)
    if variant == "xl2":  # nor have AdamW's moments in fp32: 5 GiB, of which the factored second and a bf16 first leave 1.3
        c.optimizer.update(name="adafactor_momentum", mu_dtype="bfloat16")
        c.train.update(batch_size=32, microbatch_size=0)
    if variant in ("digits", "shapes", "tiny"):  # pixels, small enough for two cores
        c.model.update(n_layer=4, n_head=4, n_embd=128, remat="none", dtype="float32", unroll_layers=True)
        c.data.update(name="digits", flip=False)
        c.model.update(image_size=8, channels=1, patch_size=2, num_classes=10)
        c.task.score_samples = 200
        c.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=200, clip_norm=1.0, b2=0.99)
        c.train.update(ema_decay=0.998, microbatch_size=0, batch_size=32)
        c.checkpoint.every = 0
        c.sample.update(num_samples=40, guidance=1.5, clip=True, batch_size=200)
    if variant == "digits":  # as published: epsilon, linear noise, learned variance, 250 steps back
        c.train.update(steps=6000)
        c.eval.update(every=3000, batches=5)
    if variant == "shapes":  # a few flat colours: x0 is the simplest thing to say
        c.model.update(image_size=16, channels=3, patch_size=4, num_classes=16, learn_sigma=False)
        c.data.update(name="shapes", image_size=16)
        c.task.update(schedule="cosine", prediction="x0", min_snr_gamma=5.0)
        c.train.update(steps=8000)
        c.eval.update(every=2000, batches=20)
        c.sample.update(sampler="dpm++", steps=20, num_samples=64)
    if variant == "tiny":  # rectified flow
        c.model.learn_sigma = False
        c.task.update(schedule="flow", prediction="velocity", timestep_sampling="logit_normal")
        c.train.update(steps=2000)
        c.eval.update(every=1000, batches=5)
        c.sample.update(sampler="heun", steps=20, clip=False)
    return c
