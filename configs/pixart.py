"""PixArt-alpha, text-to-image diffusion transformers (Chen et al. 2023), on latents and captions that --mode=prepare wrote.

  python launch.py --config=configs/pixart.py --config.data.path=CACHE      # b2 where there is a GPU, else tiny
  python launch.py --config=configs/pixart.py:xl2 --config.data.path=CACHE --config.train.init_from=PIXART_OR_DIT_FOLDER
  python launch.py --config=configs/pixart.py:lora --config.data.path=CACHE --config.train.init_from=PIXART_FOLDER
  python launch.py --config=configs/pixart.py:xl2 --mode=plan --card=rtx4070

  variant  parameters  card      time            planned peak  what to expect
  b2         122 M     RTX 4070  12 days         3.8 GiB       from scratch; not published
  xl2        611 M     RTX 4070  9 hours         4.6 GiB       every parameter fine-tuned at 256 px; not published
  lora       611 M     RTX 4070  4 hours         3.4 GiB       matrices of low rank at 512 px; not published
  tiny       1.2 M     2 cores   10 minutes      0.1 GiB       96 % of samples right for captions that are held out

Times on a GPU are arithmetic, not measurements: the planned steps' matrix products at 40 % of the card's 58 TFLOP/s. Nobody
has trained the first three to the end here.
"""

from jaxvram import recipe
from jaxvram.data.images import ImageDataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.pixart import PixArtConfig
from jaxvram.sample.diffusion import DiffusionSampleConfig
from jaxvram.tasks.diffusion import DiffusionConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("b2", "xl2", "lora", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=PixArtConfig.of_size("B/2"),  # 32 x 32 x 4 latents, 120 tokens of T5-XXL, learned variance
        task=DiffusionConfig(),
        data=ImageDataConfig(name="latents"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=1000,
            b2=0.999,
            clip_norm=1.0,
            groups={"all": ParamGroup(r".*", weight_decay=0.03)},
        ),
        train=TrainConfig(steps=400_000, batch_size=256, microbatch_size=64, ema_decay=0.9999, log_every=50),
        eval=EvalConfig(every=10_000, batches=20),
        sample=DiffusionSampleConfig(sampler="dpm++", steps=20, guidance=4.5, num_samples=16, batch_size=16),
        checkpoint=CheckpointConfig(every=5_000),
        finetune=FinetuneConfig(),
    )
    if variant in ("xl2", "lora"):  # all in bf16: 1.1 GiB for weights, as much for gradients and for moments of 8 bits
        c.model.update(n_layer=28, n_head=16, n_embd=1152, param_dtype="bfloat16")
        c.optimizer.update(learning_rate=2e-5, clip_norm=0.01)
        c.train.update(steps=20_000, batch_size=32, microbatch_size=0, ema_decay=0.0)
        c.eval.update(every=1_000, batches=10)
        c.sample.update(num_samples=4, batch_size=4)
        c.checkpoint.every = 1_000
    if variant == "xl2":
        c.optimizer.update(name="adamw_8bit", stochastic_rounding=True)
    if variant == "lora":
        c.finetune.update(method="lora", rank=16, alpha=16.0)
        c.model.image_size = 64
        c.optimizer.update(learning_rate=1e-4, clip_norm=1.0)
        c.train.update(steps=5_000, batch_size=16)
    if variant == "tiny":  # 8 x 8 x 4 latents of shapes, features of a small text encoder (docs/text_to_image.md)
        c.model.update(n_layer=4, n_head=4, n_embd=128, image_size=8, learn_sigma=False, context_dim=64, context_length=40)
        c.model.update(remat="none", dtype="float32", unroll_layers=True)
        c.task.update(schedule="cosine", prediction="x0", min_snr_gamma=5.0, score_samples=200)
        c.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=200, b2=0.99)
        c.optimizer.groups.all.weight_decay = 0.0
        c.train.update(steps=4_000, batch_size=32, microbatch_size=0, ema_decay=0.998)
        c.eval.update(every=2_000, batches=10)
        c.sample.update(steps=20, guidance=2.0, num_samples=16, batch_size=200)
        c.checkpoint.every = 0
    return c
