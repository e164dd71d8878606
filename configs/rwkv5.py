"""RWKV-5 on FineWeb's 10B-token sample: the authors' starting weights and optimizer, on one 12 GB card.

  python launch.py --config=configs/rwkv5.py            # 0.4b where there is a GPU, else tiny
  python launch.py --config=configs/rwkv5.py --mode=plan --card=rtx4070
  python launch.py --config=configs/rwkv5.py --config.train.init_from=RWKV-5-World-0.4B-v2-20231113-ctx4096.pth \
    --config.data.tokenizer=world --config.data.path=TEXT --config.optimizer.learning_rate=1e-5
  python launch.py --config=configs/rwkv5.py --config.model.version=5.0 --config.model.n_layer=12 --config.model.n_embd=768

  variant    parameters  card      time           planned peak  what to expect
  0.4b         462 M   RTX 4070  2.4 days         7.8 GiB       not known
  tiny         6.6 M   2 cores   3 minutes        0.3 GiB       training loss from 9.4 (step 10) to 4.4 on Python's help text

0.4b is the authors' size of that name, of version 5.2; the larger ones, and 5.0 and 5.1, are overrides of its model (a file
of weights that is given to it says which). FineWeb's shards come in GPT-2's tokens, which fill 50,257 of the 65,536 rows
that RWKV's own vocabulary has. The time is arithmetic, not a measurement: see rwkv6.py.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.rwkv5 import SIZES, RWKV5Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

# `auto` is the first where there is a GPU, else the last
VARIANTS = ("0.4b", "tiny")


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    version, n_layer, n_embd = SIZES["0.4b"]
    c = recipe.new(
        model=RWKV5Config(
            version=version,
            vocab_size=65536,  # of RWKV's world vocabulary
            block_size=1024,  # T
            n_layer=n_layer,  # L
            n_embd=n_embd,  # D
            remat="full",  # a stream of 2 D bytes a token and layer is kept, the rest is made again
        ),
        task=LanguageConfig(l2wrap=1e-4),  # the authors' pull on the largest logit
        data=DataConfig(dataset="fineweb", fineweb_shards=15, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            warmup_steps=10,
            b2=0.99,
            eps=1e-18,  # the authors': gradients of the table are tiny
            groups={  # only what is a matrix decays; time_decay learns twice as fast; theirs has 5.0's time_first at 3
                "decayed": ParamGroup(r".*(kernel|embedding)", weight_decay=0.001),
                "time_decay": ParamGroup(r".*/time_decay", lr_multiplier=2.0),
                "plain": ParamGroup(r".*(bias|scale|/time_mix_\w|/time_faaaa|/time_first)"),
            },
        ),
        train=TrainConfig(
            steps=182_888,  # 1.5B tokens, as many as minipile has
            batch_size=8,  # x 1024 tokens a step
            log_every=10,
        ),
        eval=EvalConfig(every=2000, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "tiny":
        c.model.update(vocab_size=50257, block_size=64, n_layer=3, n_embd=64, head_dim=16)
        c.model.update(reset_token=50256, remat="none", dtype="float32", unroll_layers=True)
        c.data.dataset = "offline"
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.0)
        c.train.update(steps=200, batch_size=8, microbatch_size=4, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c
