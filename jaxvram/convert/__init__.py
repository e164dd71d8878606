"""Weights to and from the layouts that others use: a module a model, each with `load_params` and `save`.

RWKV's have `save_official` as well, for the authors' own .pth.
"""

import importlib

from jaxvram.models import name_of


def converter(cfg):
    """The module of this package for the model of a configuration."""
    return importlib.import_module(f"jaxvram.convert.{name_of(cfg)}")
