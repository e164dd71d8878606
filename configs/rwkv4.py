"""RWKV-4 on FineWeb's 10B-token sample: the Pile models' sizes, the authors' starting weights and rates, on one 12 GB card.

  python launch.py --config=configs/rwkv4.py            # 169m where there is a GPU, else tiny
  python launch.py --config=configs/rwkv4.py:430m
  python launch.py --config=configs/rwkv4.py --mode=plan --card=rtx4070
  python launch.py --config=configs/rwkv4.py:1.5b --config.train.init_from=RWKV-4-Pile-1B5.pth \
    --config.data.tokenizer=neox --config.data.path=TEXT --config.optimizer.learning_rate=1e-5

  variant    parameters  card      time           planned peak  what to expect
  169m         169 M   RTX 4070  19 hours         3.5 GiB       not known
  430m         430 M   RTX 4070  2 days           7.2 GiB       not known
  1.5b       1,515 M   RTX 4070  to fine-tune     6.8 GiB       not known
  recall       0.1 M   2 cores   1 minute         0.1 GiB       30 % of held-out questions answered; rwkv7.py: 99.9 %
  tiny         6.6 M   2 cores   3 minutes        0.3 GiB       training loss from 9.5 (step 10) to 4.3 on Python's help text

FineWeb's shards come in GPT-2's tokens, which fill 50,257 of the 50,277 rows that the Pile models have for GPT-NeoX's
vocabulary; with tokenizer=neox a text is read in that one. Times on a GPU are arithmetic, not measurements: 6 N FLOPs a
token, of all but the table, at 40 % of the card's 58 TFLOP/s, a third more for what remat makes again. Nobody has trained
the large ones to the end.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.rwkv4 import SIZES, RWKV4Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

# `auto` is the first where there is a GPU, else the last
VARIANTS = ("169m", "430m", "1.5b", "recall", "tiny")


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    n_layer, n_embd = SIZES.get(variant, SIZES["169m"])
    c = recipe.new(
        model=RWKV4Config(
            vocab_size=50277,  # of GPT-NeoX's tokenizer
            block_size=1024,  # T
            n_layer=n_layer,  # L
            n_embd=n_embd,  # D
            table_range=6e-4,  # a fresh table's, as large as the learning rate
            remat="full",  # a stream of 2 D bytes a token and layer is kept, the rest is made again
        ),
        task=LanguageConfig(l2wrap=1e-4),  # the authors' pull on the largest logit
        data=DataConfig(dataset="fineweb", fineweb_shards=15, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=10,
            b2=0.99,
            groups={  # nothing decays; a channel's memory learns faster than the rest
                "time_decay": ParamGroup(r".*/time_decay", lr_multiplier=2.0),
                "time_first": ParamGroup(r".*/time_first", lr_multiplier=3.0),
                "plain": ParamGroup(r".*(kernel|embedding|bias|scale|/time_mix_[kvr])"),
            },
        ),
        train=TrainConfig(
            steps=91_444,  # 1.5B tokens
            batch_size=16,  # x 1024 tokens a step
            log_every=10,
        ),
        eval=EvalConfig(every=1000, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "430m":
        c.model.table_range = 4e-4
        c.optimizer.learning_rate = 4e-4
        c.train.update(steps=182_888, batch_size=8)
    if variant == "1.5b":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.update(block_size=4096, param_dtype="bfloat16", table_range=3e-4)
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=1)
    if variant == "recall":  # as in configs/rwkv7.py, which solves it with no more parameters
        c.model.update(n_layer=2, n_embd=64, d_ffn=352, vocab_size=0, block_size=32, table_range=3e-3)
        c.model.update(remat="none", dtype="float32", unroll_layers=True)
        c.data.update(name=variant, length=32, remembered=8, symbols=32, order="random")
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, schedule="wsd", final_lr_fraction=0.0)
        c.train.update(steps=800, batch_size=32, log_every=50)
        c.eval.update(every=50, batches=4)
        c.task.update(score_problems=500, l2wrap=0.0)
    if variant == "tiny":
        c.model.update(vocab_size=50257, block_size=64, n_layer=3, n_embd=64, table_range=3e-3, reset_token=50256)
        c.model.update(remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
