"""Mamba-2 on FineWeb's 10B-token sample: the paper's sizes and optimizer (Dao & Gu 2024), on one 12 GB card.

  python launch.py --config=configs/mamba2.py            # 130m where there is a GPU, else tiny
  python launch.py --config=configs/mamba2.py:370m
  python launch.py --config=configs/mamba2.py:induction  # or copying, recall: synthetic tasks, on a CPU
  python launch.py --config=configs/mamba2.py --mode=plan --card=rtx4070

  variant    parameters  card      time             planned peak  what to expect
  130m         129 M   RTX 4070  4 days for 10B     3.9 GiB       perplexity 10.5 on the Pile after 300B tokens (paper)
  370m         368 M   RTX 4070  2 weeks for 10B    7.8 GiB       8.2, likewise
  780m         780 M   RTX 4070  4 weeks for 10B    7.7 GiB       7.3, likewise
  1.3b       1,344 M   RTX 4070  to fine-tune       7.2 GiB       6.8, likewise, before
  copying      0.1 M   2 cores   20 minutes         0.2 GiB       99.8 % of held-out problems right
  induction    0.1 M   2 cores   3 minutes          0.1 GiB       99.8 % of held-out problems right
  recall       0.1 M   2 cores   2 minutes          0.1 GiB       100 % of held-out questions answered; rwkv4.py: 30 %
  tiny         3.3 M   2 cores   1 minute           0.2 GiB       training loss from 10.8 to about 5 on Python's help text

Times on a GPU are arithmetic, not measurements: 6 N FLOPs a token at 40 % of the card's 58 TFLOP/s, a third more for
what remat makes again. 780m has Adafactor instead of AdamW, 1.3b bf16 weights as well.
Times on two cores were taken beside other jobs. Perplexities are the paper's, as our reading notes quote them; nobody
has trained the large ones to the end.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.mamba2 import SIZES, Mamba2Config
from jaxvram.sample.text import SampleConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig
from jaxvram.train.step import TrainConfig

# `auto` is the first where there is a GPU, else the last
VARIANTS = ("130m", "370m", "780m", "1.3b", "copying", "induction", "recall", "tiny")


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    n_layer, n_embd = SIZES.get(variant, SIZES["130m"])
    c = recipe.new(
        model=Mamba2Config(
            vocab_size=50257,  # GPT-2's BPE, in which FineWeb's shards come
            vocab_multiple=128,  # 50304 rows: tensor cores want multiples
            block_size=2048,  # T
            n_layer=n_layer,  # L
            n_embd=n_embd,  # D
            reset_token=50256,  # <|endoftext|>: no document remembers the one before
            remat="full",  # a stream of 4 D bytes a token and layer is kept, the rest is made again
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=103, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=375, final_lr_fraction=1e-5 / 3e-3),
        train=TrainConfig(
            steps=19_073,  # 10B tokens
            batch_size=256,  # x 2048 = 524,288 tokens a step
            microbatch_size=8,
            log_every=1,
        ),
        eval=EvalConfig(every=250, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "370m":
        c.optimizer.update(learning_rate=1.5e-3, final_lr_fraction=1e-5 / 1.5e-3)
        c.train.microbatch_size = 4
    if variant == "780m":  # AdamW's 16 bytes a parameter would be 11.8 GiB before any activation
        c.optimizer.update(name="adafactor", learning_rate=6e-4, final_lr_fraction=1e-2)
        c.train.microbatch_size = 2
    if variant == "1.3b":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.param_dtype = "bfloat16"
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=2, microbatch_size=0)
    if variant in ("copying", "induction", "recall"):
        _on_problems(c, variant)
    if variant == "tiny":
        c.model.update(block_size=64, n_layer=3, n_embd=64, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c


def _on_problems(c, variant):
    """Section 4.1 of Mamba's paper, and recall: two layers, on problems made on the fly."""
    c.model.update(n_layer=2, n_embd=64, vocab_size=0, vocab_multiple=1, reset_token=-1)
    c.model.update(remat="none", dtype="float32", unroll_layers=True)
    c.optimizer.update(schedule="wsd", warmup_steps=20, final_lr_fraction=0.0)
    c.train.update(microbatch_size=0, log_every=50)
    c.task.score_problems = 500
    if variant == "induction":
        c.data.update(name=variant, length=128, order="random")
        c.model.block_size = 128
        c.optimizer.learning_rate = 3e-3
        c.train.update(steps=600, batch_size=32)
        c.eval.update(every=300, batches=4)
    if variant == "copying":  # a slower rate, for longer
        c.data.update(name=variant, length=64, remembered=8, symbols=8, order="random")
        c.model.block_size = 64 + 8
        c.optimizer.learning_rate = 1e-3
        c.train.update(steps=3600, batch_size=64)
        c.eval.update(every=900, batches=4)
    if variant == "recall":  # of 8 pairs: many small heads learn it sooner than two large ones
        c.model.update(block_size=32, d_state=64, head_dim=16, tie_head=False)
        c.data.update(name=variant, length=32, remembered=8, symbols=32, order="random")
        c.optimizer.learning_rate = 1e-2
        c.train.update(steps=800, batch_size=32)
        c.eval.update(every=50, batches=4)
