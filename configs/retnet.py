"""RetNet on FineWeb's 10B-token sample: torchscale's sizes, the paper's optimizer (Sun et al. 2023), on one 12 GB card.

  python launch.py --config=configs/retnet.py            # medium where there is a GPU, else tiny
  python launch.py --config=configs/retnet.py:base
  python launch.py --config=configs/retnet.py --mode=plan --card=rtx4070

  variant    parameters  card      time             planned peak  loss to expect
  medium         306 M   RTX 4070  10 days for 10B  5.9 GiB       not published for this size or these data
  base            71 M   RTX 4070  2 days for 10B   3.6 GiB       likewise
  xl           1,426 M   RTX 4070  to fine-tune     6.7 GiB       likewise
  tiny           3.4 M   2 cores   2 minutes        0.2 GiB       training loss from 10.8 to about 5 on Python's help text

203 M (base: 19 M, xl: 1,221 M) of them are not in the table and the head. Times on a GPU are arithmetic, not measurements:
6 N FLOPs a token, N without the table, at 40 % of the card's 58 TFLOP/s, a third more for what remat makes again. xl has
bf16 weights and Adafactor. The paper gives rates from 1.3B on (6e-4), for batches of 4M tokens; smaller ones here take the
same. Nobody has trained the large ones to the end, and no weights are published to start from.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.retnet import SIZES, RetNetConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig
from jaxvram.train.step import TrainConfig

VARIANTS = ("medium", "base", "xl", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=RetNetConfig(
            vocab_size=50257,  # GPT-2's BPE, in which FineWeb's shards come
            vocab_multiple=128,  # 50304 rows: tensor cores want multiples
            block_size=2048,  # T
            **SIZES.get(variant, SIZES["base"]),
            reset_token=50256,  # <|endoftext|>: no document remembers the one before
            remat="full",  # a stream of 4 D bytes a token and layer is kept, the rest is made again
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=103, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=375, b2=0.98, final_lr_fraction=0.1),
        train=TrainConfig(
            steps=19_073,  # 10B tokens
            batch_size=256,  # x 2048 = 524,288 tokens a step
            microbatch_size=4,
            log_every=1,
        ),
        eval=EvalConfig(every=250, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    c.optimizer.groups.decayed.weight_decay = 0.05
    if variant == "base":
        c.train.microbatch_size = 32
    if variant == "xl":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.param_dtype = "bfloat16"
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=2, microbatch_size=0)
    if variant == "tiny":
        c.model.update(n_layer=3, n_embd=64, n_head=2, d_value=96, n_inner=96)
        c.model.update(tie_head=True, block_size=64, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
