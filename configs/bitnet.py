"""BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764): a Llama of ternary matrices, on FineWeb's 10B-token sample.

  python launch.py --config=configs/bitnet.py          # 700m where there is a GPU, else tiny
  python launch.py --config=configs/bitnet.py --mode=plan --card=rtx4070
  python launch.py --config=configs/bitnet.py --mode=export --out=MODEL.gguf --storage=tq2_0     # or a folder
  python launch.py --config=configs/bitnet.py:3b --mode=sample --config.train.init_from=FOLDER
  python launch.py --config=configs/bitnet.py --config.train.init_from=LLAMA --config.model.norms=llama \
    --config.model.anneal_steps=1000 --config.optimizer.learning_rate=1e-4          # and its sizes

  variant  parameters  card      time             planned peak  what to expect
  700m         757 M   RTX 4070  4 weeks for 10B   7.9 GiB      not published for 10B tokens; the paper, after 100B of other
                                                                text: perplexity 12.87, a Llama's 12.33
  3b         3,427 M   RTX 4070  11 hours          2.1 GiB      the paper, before: 9.91, a Llama's 10.04
  tiny         6.5 M   2 cores   3 minutes         0.2 GiB      loss from 10.2 (step 10) to 4.8 on Python's help text

The 700m trains its matrices in fp32, with Adam's moments in 8 bits; the batch is half of the authors' million tokens, made
of single rows. The 3b reads packed matrices, 1.6 bits a weight, to sample from (1.4 GiB) and for a LoRA on instructions
beside them. Times on a GPU are arithmetic, not measurements: 6 N FLOPs a token and 2 N for what remat makes again (of a
LoRA 4 N and 2 N), at 40 % of the card's 58 TFLOP/s in bf16; the forward products, of int8, may do better. Nobody has
trained either to the end here.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.llama_recipe import fine_tuning
from jaxvram.models.bitnet import SIZES, BitNetConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("700m", "3b", "tiny")  # `auto` is the first where there is a GPU, else the last


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    if variant == "3b":
        return packed()
    c = recipe.new(
        model=BitNetConfig(
            vocab_size=50257,  # GPT-2's BPE, in which FineWeb's shards come
            vocab_multiple=128,
            block_size=2048,  # T
            **SIZES["700m"],
            tie_head=True,  # the head is the table: a larger vocabulary than Llama's 32,000 at the paper's size
            remat="full",
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=103, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            name="adamw_8bit",
            learning_rate=1.5e-3,
            schedule="two_stage",
            warmup_steps=375,
            final_lr_fraction=0.0,
            second_peak_fraction=2 / 3,  # 1e-3
            weight_decay_until=0.5,
            groups={
                "decayed": ParamGroup(r".*(latent|kernel|embedding)", weight_decay=0.1),
                "plain": ParamGroup(r".*(bias|scale)"),
            },
        ),
        train=TrainConfig(
            steps=19_073,  # 10B tokens
            batch_size=256,  # x 2048 = 524,288 tokens a step
            microbatch_size=1,
            log_every=1,
        ),
        eval=EvalConfig(every=250, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "tiny":
        c.model.update(block_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, n_inner=192)
        c.model.update(remat="none", dtype="float32", unroll_layers=True, tie_head=False)
        c.model.init_std = 0.1  # 1 / sqrt(D), almost: of smaller weights a step is too large a part
        c.data.dataset = "offline"
        c.optimizer.update(name="adamw", learning_rate=3e-3, warmup_steps=20)
        c.train.update(steps=300, batch_size=8, microbatch_size=0, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 60
    return c


def packed():
    """Matrices packed in 1.6 bits, from a folder or file of weights; a LoRA beside them, were it trained."""
    lora = FinetuneConfig(method="lora", rank=16, alpha=32.0)
    c = fine_tuning(
        BitNetConfig(**SIZES["3b"], weights="base3", block_size=2048, remat="full", param_dtype="bfloat16"),
        "llama2", lora, learning_rate=2e-4,
    )  # fmt: skip
    c.sample.prompt = "The"
    return c
