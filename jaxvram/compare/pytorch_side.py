"""PyTorch's half of a comparison: what it is asked, and the process that answers. JAX and PyTorch never share one."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from jaxvram.errors import UserError
from jaxvram.models import name_of

SCRIPT = pathlib.Path(__file__).parent / "twin" / "main.py"
INSTALL = "python3 -m venv TORCH && TORCH/bin/pip install torch transformers peft bitsandbytes diffusers"
VARIANTS = ("eager", "flash", "flash+checkpoint", "flash+checkpoint+8bit")
WITHOUT_ATTENTION = ("eager", "checkpoint", "checkpoint+8bit")


def request_of(recipe, cfg) -> dict:
    """The plan of a recipe's train step as the twin is asked for it (twin/main.py says what each entry is).

    Args:
      cfg: of the model, with its vocabulary.
    """
    optimizer = {name: getattr(recipe.optimizer, name) for name in ("name", "learning_rate", "b1", "b2", "eps", "clip_norm")}
    return {
        "way": "planned",
        "model": {"kind": name_of(cfg), **dataclasses.asdict(cfg)},
        "finetune": dataclasses.asdict(recipe.finetune),
        "step": {
            "batch_size": recipe.train.batch_size,
            "microbatch_size": recipe.train.microbatch_size,
            "optimizer": optimizer,
            "ema": recipe.train.ema_decay > 0,
        },
        "variants": variants_of(cfg),
    }


def variants_of(cfg) -> tuple[str, ...]:
    """PyTorch's ways to train a model, the plainest first."""
    return WITHOUT_ATTENTION if name_of(cfg).startswith("mamba") else VARIANTS


def ask(request: dict, python: str | None = None, progress=lambda line: None) -> dict:
    """The twin's answer, from another interpreter.

    Args:
      python: that has torch; None: the one that runs this.
      progress: called with the lines that tell how far it is.
    Raises:
      UserError: there is no such interpreter, it has no PyTorch, or the twin cannot answer.
    """
    python = python or sys.executable
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)  # that of this environment is not the other's
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as asked:  # not a pipe: one who ends without reading would break it
        json.dump(request, asked)
        asked.seek(0)
        try:
            process = subprocess.Popen([python, str(SCRIPT)], stdin=asked, env=environment, **pipes)
        except OSError as error:
            raise UserError(f"--torch-python={python} does not start: {error.strerror}") from error
    with process:
        said = []
        for line in process.stderr:  # the answer comes at the end, and is small: no pipe is filled meanwhile
            said.append(line.strip())
            if line.startswith(request["way"]):
                progress(f"PyTorch: {line.strip()}")
        answer = process.stdout.read()
    if process.returncode:
        raise UserError(f"PyTorch's side: {_why(said)}")
    return json.loads(answer)


def _why(said: list[str]) -> str:
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if not errors:
        return next((line for line in reversed(said) if line), "it ended without a word")
    if " has no " in errors[-1]:
        return f"{errors[-1]}; or, apart from JAX: {INSTALL}, and --torch-python=TORCH/bin/python"
    return errors[-1]
