"""AutoencoderKL, the first stage of latent diffusion (Rombach et al. 2022): images to small latents and back.

  python launch.py --config=configs/autoencoder.py                                   # kl_f8 where there is a GPU, else tiny
  python launch.py --config=configs/autoencoder.py:kl_f8 --config.data.path=IMAGES   # a folder of images
  python launch.py --config=configs/autoencoder.py:small --config.data.path=IMAGES
  python launch.py --config=configs/autoencoder.py:tiny --workdir=runs/ae            # then, for a denoiser:
  python launch.py --config=configs/autoencoder.py:tiny --workdir=runs/ae --mode=export --out=ae

  variant  parameters  card      time         planned peak  what to expect
  kl_f8       84 M     RTX 4070  10 days      5.8 GiB       published, with LPIPS as well: 24.2 dB, rFID 0.90 on ImageNet
  small       21 M     RTX 4070  3 days       4.2 GiB       not published
  tiny       1.3 M     2 cores   4 minutes    0.2 GiB       33 dB on held-out shapes, all colours and forms recognised

Times on a GPU are arithmetic, not measurements: 250,000 steps of 24 images of 256 px at 40 % of the card's 58 TFLOP/s. kl_f8
takes 12 images at a time, small all 24; both have a discriminator from step 50,001 on, whose memory is planned for.
"""

from jaxvram import recipe
from jaxvram.data.images import ImageDataConfig
from jaxvram.models.autoencoder import AutoencoderConfig
from jaxvram.tasks.autoencoder import AutoencodingConfig, ReconstructionConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("kl_f8", "small", "tiny")  # `auto` is the first where there is a GPU, else the last
GROUPS = {"autoencoder": ParamGroup(r"autoencoder/.*"), "discriminator": ParamGroup(r"discriminator/.*")}


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    is_tiny = variant == "tiny"
    c = recipe.new(
        model=AutoencoderConfig(),  # 256 px to 32 x 32 x 4
        task=AutoencodingConfig(disc_weight=0.0 if is_tiny else 0.5),
        data=ImageDataConfig(name="shapes" if is_tiny else "folder", image_size=32 if is_tiny else 256, flip=not is_tiny),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", b1=0.5, b2=0.9, clip_norm=0.0,
            groups={"all": ParamGroup(r".*")} if is_tiny else GROUPS,
        ),
        train=TrainConfig(steps=250_000, batch_size=24, microbatch_size=12, ema_decay=0.999, log_every=50),
        eval=EvalConfig(every=5_000, batches=20),
        sample=ReconstructionConfig(num_samples=16, batch_size=8),
        checkpoint=CheckpointConfig(every=5_000),
    )  # fmt: skip
    if variant == "small":
        c.model.width = 64
        c.train.microbatch_size = 0
    if is_tiny:  # 32 px to 8 x 8 x 4
        c.model.update(image_size=32, width=32, multipliers=(1, 2, 2), remat="none", dtype="float32")
        c.task.score_images = 256
        c.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100, b1=0.9, b2=0.99, clip_norm=1.0)
        c.train.update(steps=1000, batch_size=16, microbatch_size=0, ema_decay=0.99)
        c.eval.update(every=500, batches=8)
        c.checkpoint.every = 0
    return c
