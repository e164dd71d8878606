"""PyTorch's half of a comparison: what it is asked, and the process that answers. JAX and PyTorch never share one."""

import dataclasses
import os
import pathlib
import sys

from jaxvram.compare import child
from jaxvram.errors import UserError
from jaxvram.models import name_of

SCRIPT = pathlib.Path(__file__).parent / "twin" / "main.py"
INSTALL = "python3 -m venv TORCH && TORCH/bin/pip install torch transformers peft bitsandbytes diffusers"
VARIANTS = ("eager", "flash", "flash+checkpoint", "flash+checkpoint+8bit")
WITHOUT_ATTENTION = ("eager", "checkpoint", "checkpoint+8bit")
NO_ATTENTION = ("mamba", "mamba2", "retnet", "rwkv4", "rwkv7", "autoencoder")  # none that flash kernels take
TWINS = ("gpt2", "llama", "bitnet", "moe", *NO_ATTENTION, "dit", "pixart", "unet")  # those that a library has
MIXTRAL = {  # transformers' mixture, in our fields
    "router": "softmax", "renormalise": True, "n_shared_expert": 0, "balance_per_sequence": False, "balance_offsets": False,
    "capacity_factor": 0, "sandwich_norm": False, "attention_soft_cap": 0, "scale_embedding": False,
    "output_multiplier": 1, "attention_bias": False,
}  # fmt: skip
COMPILED = "compile"  # its memory is known to its compiler alone: to be measured


def request_of(recipe, cfg) -> dict:
    """The plan of a recipe's train step as the twin is asked for it (twin/main.py says what each entry is).

    Args:
      cfg: of the model, with its vocabulary.
    Raises:
      UserError: there is nothing in PyTorch to ask for.
    """
    if why := without_twin(cfg, recipe.finetune):
        raise UserError(f"no twin of {name_of(cfg)} in PyTorch is known: {why}; plan ours: --mode=plan")
    task = dataclasses.asdict(recipe.task) if name_of(cfg) == "autoencoder" else {}  # which may have a critic
    optimizer = {name: getattr(recipe.optimizer, name) for name in ("name", "learning_rate", "b1", "b2", "eps", "clip_norm")}
    return {
        "way": "planned",
        "model": {"kind": name_of(cfg), **dataclasses.asdict(cfg), **task},
        "finetune": dataclasses.asdict(recipe.finetune),
        "step": {
            "batch_size": recipe.train.batch_size,
            "microbatch_size": recipe.train.microbatch_size,
            "optimizer": optimizer,
            "ema": recipe.train.ema_decay > 0 and not recipe.train.ema_on_host,
        },
        "variants": variants_of(cfg),
    }


def without_twin(cfg, finetune) -> str:
    """Why there is nothing in PyTorch to stand beside a model as it is trained; empty: there is."""
    kind, method = name_of(cfg), finetune.method
    if kind not in TWINS:
        return f"there are those of {', '.join(TWINS)}"
    if kind == "moe" and (odd := [name for name, value in MIXTRAL.items() if getattr(cfg, name) != value]):
        said = f"model.{odd[0]}={getattr(cfg, odd[0])}"
        return f"transformers has of mixtures Mixtral, and none that trains with {said} (Grok-1 was never in it)"
    if kind == "bitnet" and cfg.weights != "latent":
        return f"through model.weights={cfg.weights} no gradient passes in transformers' packed layers"
    if kind == "bitnet" and cfg.anneal_steps:
        return "transformers' layers round all the way from the start, without model.anneal_steps"
    if method != "none" and (kind, method) != ("moe", "router") and (kind != "llama" or method == "router"):
        return f"of it there is none with finetune.method={method}"
    return ""


def variants_of(cfg, way: str = "planned") -> tuple[str, ...]:
    """PyTorch's ways to train a model, the plainest first."""
    names = WITHOUT_ATTENTION if name_of(cfg) in NO_ATTENTION else VARIANTS
    return (*names, COMPILED) if way == "measured" else names


def ask(request: dict, python: str | None = None, progress=lambda line: None, **environment: str) -> dict:
    """The twin's answer, from another interpreter.

    Args:
      python: that has torch; None: the one that runs this.
      progress: called with the lines that tell how far it is.
      environment: what of it is changed.
    Raises:
      UserError: there is no such interpreter, it has no PyTorch, or the twin cannot answer.
    """
    python = python or sys.executable
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"} | environment
    environment.pop("PYTHONPATH", None)  # that of this environment is not the other's
    try:
        return child.ask([python, str(SCRIPT)], request, environment, lambda line: progress(f"PyTorch: {line}"))
    except OSError as error:
        raise UserError(f"--torch-python={python} does not start: {error.strerror}") from error
    except child.ChildError as error:
        raise UserError(f"PyTorch's side: {_advised(str(error))}") from error


def _advised(error: str) -> str:
    if " has no " in error:
        return f"{error}; or, apart from JAX: {INSTALL}, and --torch-python=TORCH/bin/python"
    if "a PyTorch built for it" in error:
        return f"{error}; --torch-python=PYTHON names one that has it: {INSTALL}"
    return error
