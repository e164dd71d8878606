"""RWKV-7 on FineWeb's 10B-token sample: the official sizes, starting weights and optimizer, on one 12 GB card.

  python launch.py --config=configs/rwkv7.py            # 0.1b where there is a GPU, else tiny
  python launch.py --config=configs/rwkv7.py:0.4b
  python launch.py --config=configs/rwkv7.py --mode=plan --card=rtx4070
  python launch.py --config=configs/rwkv7.py:0.4b --config.train.init_from=RWKV-x070-World-0.4B.pth \
    --config.data.tokenizer=world --config.data.path=TEXT --config.optimizer.learning_rate=1e-5

  variant    parameters  card      time           planned peak  what to expect
  0.1b         191 M   RTX 4070  18 hours         3.5 GiB       the authors' demo on minipile: 3.30 after 12 x 20.6M tokens
  0.4b         451 M   RTX 4070  2 days           7.8 GiB       not known
  1.5b       1,527 M   RTX 4070  to fine-tune     7.2 GiB       not known
  recall       0.1 M   2 cores   2 minutes        0.1 GiB       99.9 % of held-out questions answered; rwkv4.py: 30 %
  tiny         6.6 M   2 cores   3 minutes        0.3 GiB       training loss from 9.4 (step 10) to 4.2; held out 4.4

FineWeb's shards come in GPT-2's tokens, which fill 50,257 of the 65,536 rows that RWKV's own vocabulary has; with
tokenizer=world a text is read in that one. tiny reads Python's help text. Times on a GPU are arithmetic, not measurements:
6 N FLOPs a token at 40 % of the card's 58 TFLOP/s, a third more for what remat makes again. Nobody has trained the large
ones to the end. The demo's loss is the authors' log, on another text, of another vocabulary.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.rwkv7 import SIZES, RWKV7Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

# `auto` is the first where there is a GPU, else the last
VARIANTS = ("0.1b", "0.4b", "1.5b", "recall", "tiny")


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    n_layer, n_embd, (d_decay, d_rate, d_value, d_gate) = SIZES.get(variant, SIZES["0.1b"])
    c = recipe.new(
        task=LanguageConfig(l2wrap=1e-4),  # the authors': keeps logits within what bf16 tells apart
        model=RWKV7Config(
            vocab_size=65536,  # of RWKV's world vocabulary
            block_size=512,  # T
            n_layer=n_layer,  # L
            n_embd=n_embd,  # D
            d_decay=d_decay,  # ranks as the published checkpoints have them
            d_rate=d_rate,
            d_value=d_value,
            d_gate=d_gate,
            remat="full",  # a stream of 2 D bytes a token and layer is kept, the rest is made again
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=15, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=10,
            b2=0.99,
            eps=1e-18,  # the authors': gradients of the table are tiny
            groups={  # only what is a matrix decays; the decay's bias learns twice as fast
                "decayed": ParamGroup(r".*(kernel|embedding)", weight_decay=0.001),
                "w0": ParamGroup(r".*/att/w0", lr_multiplier=2.0),
                "plain": ParamGroup(r".*(bias|scale|/[avk]0|/[wavg][12]|/x_[rwkvag]|/k_k|/k_a|/r_k)"),
            },
        ),
        train=TrainConfig(
            steps=182_888,  # 1.5B tokens, as many as minipile has
            batch_size=16,  # x 512 tokens a step
            log_every=10,
        ),
        eval=EvalConfig(every=2000, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "0.4b":
        c.model.block_size = 1024
        c.optimizer.learning_rate = 4e-4
        c.train.update(batch_size=8)
    if variant == "1.5b":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.update(block_size=4096, param_dtype="bfloat16")
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=1)
    if variant == "recall":  # of 8 pairs (Arora et al. 2023, arXiv:2312.04927)
        c.model.update(n_layer=2, n_embd=64, head_dim=32, vocab_size=0, block_size=32)
        c.model.update(d_decay=0, d_rate=0, d_value=0, d_gate=0, remat="none", dtype="float32", unroll_layers=True)
        c.data.update(name=variant, length=32, remembered=8, symbols=32, order="random")
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, schedule="wsd", final_lr_fraction=0.0)
        c.train.update(steps=800, batch_size=32, log_every=50)
        c.eval.update(every=50, batches=4)
        c.task.update(score_problems=500, l2wrap=0.0)
    if variant == "tiny":
        c.model.update(vocab_size=50257, block_size=64, n_layer=3, n_embd=64, head_dim=16, reset_token=50256)
        c.model.update(d_decay=0, d_rate=0, d_value=0, d_gate=0, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
