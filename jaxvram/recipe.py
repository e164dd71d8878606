"""The edge where recipes meet the code: configs/NAME.py makes a ConfigDict, everything inside sees frozen dataclasses."""

import dataclasses
import importlib.util
import pathlib
import traceback
import types
import typing
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict, config_dict

from jaxvram.errors import UserError, nearest
from jaxvram.finetune.config import FinetuneConfig
from jaxvram.models import MODELS, name_of
from jaxvram.tasks import TASK_OF, TASKS
from jaxvram.train.checkpoint import CheckpointConfig
from jaxvram.train.evaluate import EvalConfig
from jaxvram.train.optimizer import OptimizerConfig
from jaxvram.train.sharding import MeshConfig
from jaxvram.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run, whole: what configs/NAME.py says, checked."""

    name: str  # of the file
    variant: str
    task: typing.Any  # of its task (tasks/): so are data and sample
    model: typing.Any  # of its architecture
    finetune: FinetuneConfig
    data: typing.Any
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    sample: typing.Any
    checkpoint: CheckpointConfig
    mesh: MeshConfig

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


SECTIONS = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in ("name", "variant")}


def sections_of(model: str) -> dict[str, type]:
    """The dataclass of every section of a recipe for the model of that name."""
    return SECTIONS | TASKS[TASK_OF[model]].SECTIONS | {"model": MODELS[model][1]}


def new(*, model, **sections) -> ConfigDict:
    """A locked ConfigDict of every section: those given as dataclasses, the others by the defaults of the model's task."""
    if unknown := set(sections) - set(SECTIONS):
        raise TypeError(f"unknown sections {sorted(unknown)}; valid: {sorted(SECTIONS)}")
    kind = name_of(model)
    types_of = sections_of(kind)
    sections["model"] = model
    for name, section in sections.items():
        if type(section) is not types_of[name]:
            raise TypeError(f"section {name} is a {type(section).__name__}; {kind} takes a {types_of[name].__name__}")
    config = ConfigDict({name: _to_config(sections.get(name) or cls()) for name, cls in types_of.items()})
    config.model.name = kind
    return config.lock()


def choose(variant: str, variants: tuple[str, ...]) -> str:
    """The variant asked for; 'auto' is the first where there is a GPU and the last, `tiny`, where there is none."""
    if variant == "auto":
        return variants[0] if jax.default_backend() == "gpu" else variants[-1]
    if variant not in variants:
        raise UserError(f"variant {variant!r} is unknown{nearest(variant, variants)}")
    return variant


def load(file_and_variant: str, for_card: bool = False) -> tuple[ConfigDict, str, str]:
    """(config, recipe name, variant) of `configs/NAME.py[:VARIANT]`; `for_card`: 'auto' is the GPU's whatever runs here."""
    file, _, variant = file_and_variant.partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        known = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise UserError(f"there is no recipe {file!r}{nearest(file, known) if known else ''}")
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError, NameError) as error:
        raise UserError(f"recipe {file} does not load: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config") or not hasattr(module, "VARIANTS"):
        raise UserError(f"recipe {file} has no get_config(variant) or no VARIANTS")
    if variant in ("", "auto"):
        variant = module.VARIANTS[0] if for_card else choose("auto", module.VARIANTS)
    try:
        return module.get_config(variant), path.stem, variant
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        line = traceback.extract_tb(error.__traceback__)[1].lineno
        raise UserError(f"recipe {file}, line {line}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def build(config: ConfigDict, name: str, variant: str) -> Recipe:
    """The checked recipe.

    Raises:
      UserError: a field is unknown (with the nearest valid name) or has the wrong type.
    """
    values, kind = config.to_dict(), config.model.name
    if kind not in MODELS:
        raise UserError(f"model.name={kind!r} is unknown{nearest(str(kind), MODELS)}")
    del values["model"]["name"]
    return of_sections(values | {"name": name, "variant": variant}, kind)


def of_sections(values: Mapping, kind: str) -> Recipe:
    """The recipe of what `Recipe.as_dict` gave, also after a journey through JSON. `kind`: of its model."""
    sections = {name: _from_config(cls, values[name], name) for name, cls in sections_of(kind).items()}
    return Recipe(name=values["name"], variant=values["variant"], **sections)


def _to_config(value):
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        fields = {f.name: _to_config(getattr(value, f.name)) for f in dataclasses.fields(value)}
        empty = {k: config_dict.placeholder(_plain_type(hints[k])) for k, v in fields.items() if v is None}
        return ConfigDict(fields | empty)
    if isinstance(value, Mapping):
        return ConfigDict({key: _to_config(item) for key, item in value.items()})
    return value


def _plain_type(hint):
    """`str` of `str | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def _from_config(hint, value, path: str):
    hint = _plain_type(hint) if value is not None else types.NoneType
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        for name in value:
            if name not in hints:
                raise UserError(f"{path}.{name} is no field of {hint.__name__}{nearest(name, hints)}")
        return hint(**{name: _from_config(hints[name], item, f"{path}.{name}") for name, item in value.items()})
    if typing.get_origin(hint) is not None and issubclass(typing.get_origin(hint), Mapping):
        item_hint = typing.get_args(hint)[1]
        return {name: _from_config(item_hint, item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    plain = typing.get_origin(hint) or hint
    if plain is tuple and type(value) is list:  # after a journey through JSON
        return tuple(value)
    if type(value) is not plain:
        raise UserError(f"{path}={value!r} is a {type(value).__name__}; it must be a {plain.__name__}")
    return value
