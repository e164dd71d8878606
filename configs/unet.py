"""U-Net diffusion of pixels (Ho et al. 2020), unconditional or of classes.

  python launch.py --config=configs/unet.py                                     # pixel64 where there is a GPU, else tiny
  python launch.py --config=configs/unet.py:pixel64 --config.data.path=IMAGES   # a folder of images
  python launch.py --config=configs/unet.py:pixel64 --mode=plan --card=rtx4070
"""

from jaxvram import recipe
from jaxvram.data.images import ImageDataConfig
from jaxvram.models.unet import UNetConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("pixel64", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=UNetConfig.of_size("pixel64"),
        task=DiffusionConfig(label_dropout=0.0),
        data=ImageDataConfig(name="folder", image_size=64, flip=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="cosine", warmup_steps=500, b1=0.95, b2=0.999, clip_norm=1.0,
            groups={"all": ParamGroup(r".*", weight_decay=1e-6)},
        ),
        train=TrainConfig(steps=50_000, batch_size=64, ema_decay=0.9999, log_every=50),
        eval=EvalConfig(every=5_000, batches=10),
        sample=DiffusionSampleConfig(sampler="ddpm", steps=250, guidance=1.0, num_samples=16, clip=True),
        checkpoint=CheckpointConfig(every=5_000),
    )
    if variant == "tiny":  # small enough for two cores
        c.model.update(image_size=16, channels=3, num_classes=16, width=32, multipliers=(1, 2), res_blocks=1)
        c.model.update(attention_levels=(1,), heads=2, head_dim=0, groups=8, remat="none", dtype="float32")
        c.task.update(schedule="flow", prediction="velocity", timestep_sampling="logit_normal", label_dropout=0.1)
        c.task.score_samples = 200
        c.data.update(name="shapes", image_size=16, flip=False)
        c.optimizer.update(learning_rate=1e-3, warmup_steps=200, b1=0.9, b2=0.99)
        c.train.update(steps=2000, batch_size=32, ema_decay=0.998)
        c.eval.update(every=1000, batches=5)
        c.sample.update(sampler="heun", steps=20, num_samples=64, guidance=1.5, clip=False, batch_size=200)
        c.checkpoint.every = 0
    return c
