"""GPT-2 on FineWeb's 10B-token sample, as llm.c trains the 124M (scripts/run_gpt2_124M.sh at f1e2ace), on one 12 GB card.

  python launch.py --config=configs/gpt2.py            # 124m where there is a GPU, else tiny
  python launch.py --config=configs/gpt2.py:medium
  python launch.py --config=configs/gpt2.py --mode=plan --card=rtx4070

  variant  parameters  card      time                planned peak  loss to expect
  124m         124 M   RTX 4070  4 days for 10B      2.5 GiB       3.28 to 3.29 on FineWeb's val shard (llm.c's own run);
                                                                   OpenAI's own weights: 3.425
  medium       354 M   RTX 4070  2 weeks for 10B     6.3 GiB       not published for 10B tokens; OpenAI's weights: 3.083
  large        774 M   RTX 4070  4 weeks for 10B     6.8 GiB       not published for 10B tokens; OpenAI's weights: 3.001
  xl         1,558 M   RTX 4070  to fine-tune        7.6 GiB       OpenAI's weights, before: 2.831
  tiny           1 M   2 cores   2 minutes           0.2 GiB       training loss from 10.8 to about 5 on Python's help text

The data are 103 shards, 20 GB, fetched before the first step (--config.data.fineweb_shards=1: a trial with 100M tokens).
Times are arithmetic, not measurements: 6 N + 6 L D T FLOPs a token at 40 % of the card's 58 TFLOP/s. Without remat
the 124m at microbatch 16 plans 7.7 GiB and a quarter fewer FLOPs a step (--mode=fit finds the largest that fits).
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.sample.text import SampleConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig
from jaxvram.train.step import TrainConfig

VARIANTS = ("124m", "medium", "large", "xl", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=GPT2Config(
            vocab_size=50257,  # GPT-2's BPE
            vocab_multiple=128,  # 50304 rows: tensor cores want multiples
            block_size=1024,  # T
            n_layer=12,  # L
            n_head=12,  # H
            n_embd=768,  # D
            dropout=0.0,
            activation="gelu_tanh",
            remat="full",  # 12 x 8 x 1024 x 768 activations are kept, the rest is made again
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=103, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, final_lr_fraction=0.0),
        train=TrainConfig(
            steps=18_865,  # 10B tokens
            batch_size=512,  # x 1024 = 524,288 tokens a step
            microbatch_size=8,
            log_every=1,
        ),
        eval=EvalConfig(every=250, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "medium":
        c.model.update(n_layer=24, n_head=16, n_embd=1024)
        c.optimizer.learning_rate = 3e-4
    if variant == "large":  # AdamW's 16 bytes a parameter would be 11.5 GiB before any activation
        c.model.update(n_layer=36, n_head=20, n_embd=1280)
        c.optimizer.update(name="adafactor", learning_rate=2.5e-4)
        c.train.microbatch_size = 4
    if variant == "xl":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.update(n_layer=48, n_head=25, n_embd=1600, param_dtype="bfloat16")
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=8, microbatch_size=0)
    if variant == "tiny":
        c.model.update(block_size=64, n_layer=2, n_head=2, n_embd=64, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
