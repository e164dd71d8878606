"""Adding two numbers of two digits, the sum written backwards: minGPT's projects/adder at 37baab7.

  python launch.py --config=configs/mingpt_adder.py

  variant  card      minutes  planned peak  to expect
  nano     any             5   0.1 GiB      97 to 99.6 % of held-out sums from 3,000 steps on; minGPT gives no figure
                                            (its notebook of 2020, a larger model: 99.90 % of 1,000)
  tiny     2 cores         1   0.1 GiB      99.6 % of 500 held-out sums after 3,000 of its 4,000 steps, loss 0.03
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.gpt2 import GPT2Config
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import LanguageConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.guard import GuardConfig
from jaxvram.train.optimizer import LINEAR_DECAY, OptimizerConfig
from jaxvram.train.step import TrainConfig

VARIANTS = ("nano", "tiny")  # `auto` is the first where there is a GPU, the last where there is none


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        task=LanguageConfig(score_problems=500),
        model=GPT2Config(
            vocab_size=10,  # digits
            block_size=6,  # 3 n digits: two numbers and their sum, the last digit not read
            n_layer=3,  # gpt-nano
            n_head=3,
            n_embd=48,
            dropout=0.1,
            activation="gelu_tanh",  # minGPT's NewGELU
            tie_head=False,
            remat="none",
            dtype="float32",  # too small for bf16 to pay
            unroll_layers=True,
        ),
        data=DataConfig(name="adder"),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="constant", b2=0.95, groups=LINEAR_DECAY),
        train=TrainConfig(steps=20000, batch_size=64, seed=3407, guard=GuardConfig(z_score=0.0)),
        eval=EvalConfig(every=1000, batches=5),
        sample=SampleConfig(num_samples=8),
    )
    if variant == "tiny":
        c.train.steps = 4000
    return c
