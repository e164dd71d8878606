"""Latent diffusion told by a text (Rombach et al. 2022), Stable Diffusion's U-Net: small, or its own, whole or by LoRA.

  python launch.py --config=configs/stable_diffusion.py:small --config.data.path=CACHE       # what --mode=prepare wrote
  python launch.py --config=configs/stable_diffusion.py:sd1 --config.data.path=CACHE --config.train.init_from=SD_FOLDER
  python launch.py --config=configs/stable_diffusion.py:tiny --config.data.path=CACHE        # docs/text_to_image.md
  python launch.py --config=configs/stable_diffusion.py:tiny --config.data.path=CACHE --mode=sample --prompt="a red cross"
  python launch.py --config=configs/stable_diffusion.py:sd1_full --mode=plan --card=rtx4070

  variant   parameters  card      time            planned peak  what to expect
  small       142 M     RTX 4070  3 days          3.6 GiB       from scratch; not published
  sd1         860 M     RTX 4070  15 minutes      2.4 GiB       LoRA of rank 16 at 512 px; not published
  sd1_full    860 M     RTX 4070  3 hours         8.6 GiB       every parameter at 512 px; not published
  emoji       5.4 M     2 cores   22 minutes      0.2 GiB       1,001 emoji by heart: 95 % of samples are those asked for
  tiny        1.1 M     2 cores   10 minutes      0.1 GiB       98 % of samples right for captions that are held out

Times on a GPU are arithmetic, not measurements: matrix products and convolutions at 40 % of the card's 58 TFLOP/s; before
the first step of sd1_full the compiler works for ten minutes of a core. emoji and tiny have a text encoder of their own,
trained with the U-Net, and read captions as bytes; the others read features of CLIP's. `auto` is small where there is a GPU,
else tiny.
"""

from jaxvram import recipe
from jaxvram.data.images import ImageDataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.unet import UNetConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("small", "sd1", "sd1_full", "emoji", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=UNetConfig.of_size("sd128", context_dim=768, context_length=77),
        task=DiffusionConfig(schedule="scaled_linear"),
        data=ImageDataConfig(name="latents"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=10_000, b2=0.999, clip_norm=1.0,
            groups={"all": ParamGroup(r".*", weight_decay=0.01)},
        ),
        train=TrainConfig(steps=400_000, batch_size=128, microbatch_size=32, ema_decay=0.9999, log_every=50),
        eval=EvalConfig(every=10_000, batches=20),
        sample=DiffusionSampleConfig(sampler="dpm++", steps=25, guidance=7.5, num_samples=16, batch_size=8),
        checkpoint=CheckpointConfig(every=5_000),
        finetune=FinetuneConfig(),
    )
    if variant in ("sd1", "sd1_full"):  # 64 x 64 latents; weights in bf16: 1.6 GiB
        c.model.update(UNetConfig.of_size("sd1", image_size=64, param_dtype="bfloat16").__dict__)
        c.train.update(steps=8_000, batch_size=8, microbatch_size=1, ema_decay=0.0)
        c.eval.update(every=1_000, batches=20)
        c.sample.update(num_samples=4, batch_size=1)
        c.optimizer.update(learning_rate=1e-5, warmup_steps=500)
        c.checkpoint.every = 1_000
    if variant == "sd1":
        c.finetune.update(method="lora", rank=16, alpha=16.0)
        c.optimizer.learning_rate = 1e-4
        c.train.update(steps=2_000, batch_size=4, microbatch_size=4)
    if variant == "sd1_full":
        c.optimizer.update(name="adafactor_momentum", mu_dtype="bfloat16", stochastic_rounding=True)
    if variant in ("emoji", "tiny"):
        small_unet(c)
    if variant == "emoji":  # 1,021 pictures, each with a name of its own
        c.model.update(width=64, context_dim=96, context_length=72, text_ngrams=(3, 4, 5))
        c.data.val_fraction = 0.02
        c.task.update(min_snr_gamma=0.0, score_samples=0)  # names matter where noise is strong: no less weight there
        c.train.steps = 12_000
        c.eval.update(every=12_000, batches=1, batch_size=16)  # at the end alone: names held out are not to be known
    return c


def small_unet(c):
    """Latents of 32 pixels a side, 8 x 8 x 4, on two cores; the text as bytes."""
    c.model.update(image_size=8, width=32, multipliers=(1, 2), res_blocks=1, attention_levels=(1,))
    c.model.update(heads=2, head_dim=0, groups=8, context_dim=64, context_length=40, text_layers=2, text_heads=4)
    c.model.update(remat="none", dtype="float32")
    c.task.update(schedule="cosine", prediction="x0", min_snr_gamma=5.0, score_samples=200)
    c.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=200, b2=0.99)
    c.optimizer.groups.all.weight_decay = 0.0
    c.train.update(steps=8_000, batch_size=32, microbatch_size=0, ema_decay=0.998)
    c.eval.update(every=4_000, batches=10)
    c.sample.update(steps=20, guidance=2.0, num_samples=16, batch_size=200)
    c.checkpoint.every = 0
