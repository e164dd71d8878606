"""RWKV-6 on FineWeb's 10B-token sample: the authors' starting weights and optimizer, on one 12 GB card.

  python launch.py --config=configs/rwkv6.py            # 0.1b where there is a GPU, else tiny
  python launch.py --config=configs/rwkv6.py --mode=plan --card=rtx4070
  python launch.py --config=configs/rwkv6.py:1.6b --config.train.init_from=RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth \
    --config.data.tokenizer=world --config.data.path=TEXT --config.optimizer.learning_rate=1e-5

  variant    parameters  card      time           planned peak  what to expect
  0.1b         197 M   RTX 4070  21 hours         3.6 GiB       not known
  1.6b       1,600 M   RTX 4070  to fine-tune     7.5 GiB       not known
  tiny         6.6 M   2 cores   3 minutes        0.3 GiB       training loss from 9.4 (step 10) to 4.4 on Python's help text

FineWeb's shards come in GPT-2's tokens, which fill 50,257 of the 65,536 rows that RWKV's own vocabulary has; with
tokenizer=world a text is read in that one. Times on a GPU are arithmetic, not measurements: 6 N FLOPs a token, the table not
counted, at 40 % of the card's 58 TFLOP/s, a third more for what remat makes again. Nobody has trained the large ones to the
end. The authors published no RWKV-6 of 0.1b: it is the size of their RWKV-7 of that name.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.rwkv6 import SIZES, RWKV6Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

# `auto` is the first where there is a GPU, else the last
VARIANTS = ("0.1b", "1.6b", "tiny")


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    n_layer, n_embd = SIZES.get(variant, SIZES["0.1b"])
    c = recipe.new(
        model=RWKV6Config(
            vocab_size=65536,  # of RWKV's world vocabulary
            block_size=512,  # T
            n_layer=n_layer,  # L
            n_embd=n_embd,  # D
            remat="full",  # a stream of 2 D bytes a token and layer is kept, the rest is made again
        ),
        task=LanguageConfig(l2wrap=1e-4),  # the authors' pull on the largest logit
        data=DataConfig(dataset="fineweb", fineweb_shards=15, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=10,
            b2=0.99,
            eps=1e-18,  # the authors': gradients of the table are tiny
            groups={  # only what is a matrix decays; the decay's bias learns twice as fast
                "decayed": ParamGroup(r".*(kernel|embedding)", weight_decay=0.001),
                "time_decay": ParamGroup(r".*/time_decay", lr_multiplier=2.0),
                "plain": ParamGroup(r".*(bias|scale|/time_maa_\w+|/time_decay_w[12]|/time_faaaa)"),
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
    if variant == "1.6b":  # weights and gradients alone fill the card in fp32; in bf16 small updates are rounded away
        c.model.update(block_size=4096, param_dtype="bfloat16")
        c.optimizer.update(name="adafactor", learning_rate=3e-5, schedule="constant", warmup_steps=100)
        c.train.update(steps=1000, batch_size=1)
    if variant == "tiny":
        c.model.update(vocab_size=50257, block_size=64, n_layer=3, n_embd=64, head_dim=16, d_mix=8, d_decay=8)
        c.model.update(reset_token=50256, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
