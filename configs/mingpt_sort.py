"""Sorting six digits of {0, 1, 2}: minGPT's demo.ipynb at 37baab7. A model that learns an algorithm in a minute.

  python launch.py --config=configs/mingpt_sort.py

  variant  card      minutes  planned peak  to expect
  tiny     any             1   0.1 GiB      every held-out problem right (minGPT: 5000 of 5000; loss .00042 at step 1900)
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

VARIANTS = ("tiny",)  # small enough for any machine


def get_config(variant="auto"):
    recipe.choose(variant, VARIANTS)
    return recipe.new(
        task=LanguageConfig(score_problems=1000),
        model=GPT2Config(
            vocab_size=3,  # digits 0, 1, 2
            block_size=11,  # six digits asked, six answered, the last one not read
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
        data=DataConfig(name="sort"),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="constant", b2=0.95, groups=LINEAR_DECAY),
        # Near zero loss a single wrong digit lies far out of the window, and is what there is left to learn from.
        train=TrainConfig(steps=2000, batch_size=64, guard=GuardConfig(z_score=0.0)),
        eval=EvalConfig(every=500, batches=10),
        sample=SampleConfig(num_samples=8),
    )
