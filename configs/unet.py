"""U-Net diffusion of pixels (Ho et al. 2020): of a folder of images, without classes; of small shapes, with.

  python launch.py --config=configs/unet.py                                     # pixel64 where there is a GPU, else tiny
  python launch.py --config=configs/unet.py:pixel64 --config.data.path=IMAGES   # a folder, in it a folder of images a class
  python launch.py --config=configs/unet.py:pixel64 --mode=plan --card=rtx4070

  variant  parameters  card      time            planned peak  what to expect
  pixel64    114 M     RTX 4070  5 hours         4.2 GiB       no figure is published for it
  tiny       0.7 M     2 cores   4 minutes       0.1 GiB       82 % of samples have the colour and the shape asked for

pixel64 is the U-Net of diffusers' example of unconditional training, which fits flowers in 100 epochs of them. Its time is
arithmetic: 50,000 steps, four forward passes' FLOPs a step, at 40 % of the card's 58 TFLOP/s. Stable Diffusion's U-Net has a
recipe of its own, configs/stable_diffusion.py.
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
        model=UNetConfig.of_size("pixel64"),  # 64 x 64 x 3, no classes
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
        c.train.update(steps=1500, batch_size=32, ema_decay=0.998)
        c.eval.update(every=750, batches=5)
        c.sample.update(sampler="heun", steps=20, num_samples=64, guidance=1.5, clip=False, batch_size=200)
        c.checkpoint.every = 0
    return c
