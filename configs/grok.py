"""A small Grok: Grok-1's layer, 8 experts as wide as GPT-2 124M's, of which a token passes 2; on FineWeb, one 12 GB card.

  python launch.py --config=configs/grok.py            # 8x124m where there is a GPU, else tiny
  python launch.py --config=configs/grok.py --mode=plan --card=rtx4070
  python launch.py --config=configs/grok.py --config.model.capacity_factor=1.25   # with dropping, as GShard has it

  variant   parameters  card      time            planned peak  loss to expect
  8x124m         511 M   RTX 4070  7 days for 10B  8.6 GiB       not published for this size or these data
  lossfree       511 M   RTX 4070  7 days for 10B  8.6 GiB       the same, loads evened out by offsets instead of a loss
  tiny           0.5 M   2 cores   1 minute        0.1 GiB       validation 2.42 on Python's help text, by characters

170 M parameters meet a token. The time is arithmetic, not a measurement: 8 FLOPs for each of them (remat makes the forward
pass twice) at 40 % of the card's 58 TFLOP/s. Grok-1 was published without training code: start, rates and losses are ours.
"""

from jaxvram import recipe
from jaxvram.data import DataConfig
from jaxvram.models.moe import GROK, MoEConfig
from jaxvram.sample.text import SampleConfig
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import MATRICES_DECAY, OptimizerConfig, ParamGroup
from jaxvram.train.step import TrainConfig

VARIANTS = ("8x124m", "lossfree", "tiny")  # `auto` is the first where there is a GPU, else the last
OFFSETS = {"offsets": ParamGroup(r".*expert_offset", sign_rate=0.001)}


def get_config(variant="auto"):
    variant = recipe.choose(variant, VARIANTS)
    c = recipe.new(
        model=MoEConfig(
            **GROK,  # norms before and after, scores capped at 30, GeGLU, weights as they are, scales of table and logits
            vocab_size=50257,  # GPT-2's BPE, in which FineWeb's shards come
            vocab_multiple=128,  # 50304 rows: tensor cores want multiples
            block_size=1024,  # T
            n_layer=12,  # L
            n_embd=768,  # D
            n_inner=2048,  # F, of an expert: three matrices of it are GPT-2's two of 3072
            n_head=12,  # H
            n_kv_head=4,  # G
            n_expert=8,  # E
            n_expert_per_token=2,  # k
            balance_loss=0.01,
            z_loss=0.001,
            remat="full",
        ),
        data=DataConfig(dataset="fineweb", fineweb_shards=103, tokenizer="gpt2", order="shuffled"),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=700,
            final_lr_fraction=0.1,
            groups=MATRICES_DECAY | (OFFSETS if variant == "lossfree" else {}),
        ),
        train=TrainConfig(
            steps=18_865,  # 10B tokens
            batch_size=512,  # x 1024 = 524,288 tokens a step
            microbatch_size=8,
            log_every=1,
        ),
        eval=EvalConfig(every=250, batches=20),
        checkpoint=CheckpointConfig(best=True),
        sample=SampleConfig(prompt="The", max_new_tokens=200, num_samples=2),
    )
    if variant == "lossfree":  # Wang et al. 2024: offsets of the choice instead of a loss
        c.model.update(balance_loss=0.0, balance_offsets=True)
    if variant == "tiny":  # characters: of GPT-2's tokens every third is a blank here, and all blanks go one way
        c.model.update(n_layer=3, n_embd=64, n_inner=96, n_head=4, n_kv_head=2, block_size=128)
        c.model.update(vocab_size=0, vocab_multiple=1, remat="none", dtype="float32", unroll_layers=True)
        c.data.update(dataset="offline", tokenizer="char")
        c.optimizer.update(learning_rate=3e-3, warmup_steps=20, final_lr_fraction=0.1)
        c.train.update(steps=300, batch_size=16, microbatch_size=8, log_every=10)
        c.eval.update(every=100, batches=10)
        c.sample.max_new_tokens = 100
    return c
