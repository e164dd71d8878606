"""The house stays in order: imports run one way, files and functions stay short, nothing is left to be done."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {path: path.relative_to(ROOT) for path in sorted((ROOT / "jaxvram").rglob("*.py"))}
EVERYWHERE = {"errors", "quiet"}  # import nothing of ours

# From the top down: a module may import what stands on its own floor or below.
FLOORS = (
    ("main",),
    ("modes", "host", "compare", "upcycle", "plan_encoders"),
    ("recipe", "llama_recipe"),  # the edge between configs and dataclasses: reads every section, so it stands above them
    ("train", "vram"),
    ("tasks",),
    ("sample",),
    ("finetune",),
    ("models",),
    ("layers",),
    ("kernels",),
)
BESIDE = ("data", "convert")  # imported by the top floors and by tasks; themselves they import models and below
MAY_IMPORT_DATA = {"main", "modes", "upcycle", "plan_encoders", "host", "recipe", "llama_recipe", "tasks", "data"}
# The loop asks for batches ahead of time. It knows `batches(source, ...)`, which takes any source, and nothing of texts.
# A header of GGUF is read in one place, for the tokenizer in it and for the weights behind it.
ALLOWED = {("train.loop", "data.pipeline"), ("convert.gguf", "data.gguf_metadata")}


@functools.cache
def imports_of(path):
    """Names below jaxvram that a file imports anywhere, inside functions too: 'train.loop', 'errors'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                exists = (ROOT / (whole.replace(".", "/") + ".py")).exists() or (
                    ROOT / whole.replace(".", "/")
                ).is_dir()
                found.add(whole if exists else node.module)
    return {name.removeprefix("jaxvram").lstrip(".") for name in found if re.match(r"jaxvram(\.|$)", name)} - {""}


def name_of(relative):
    return ".".join(relative.with_suffix("").parts[1:]).removesuffix(".__init__")


def floor(name):
    return next((i for i, names in enumerate(FLOORS) if name.split(".")[0] in names), None)


def is_allowed(importer, imported):
    top, into = importer.split(".")[0], imported.split(".")[0]
    if imported in EVERYWHERE or (importer, imported) in ALLOWED:
        return True
    if into in BESIDE:
        return top in MAY_IMPORT_DATA or top == into
    if top in BESIDE:
        return floor(imported) is not None and floor(imported) >= floor("models")
    return floor(importer) is not None and floor(imported) is not None and floor(imported) >= floor(importer)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(MODULES[path]))
def test_imports_run_one_way(path):
    importer = name_of(MODULES[path])
    if importer in ("", *EVERYWHERE):
        assert not imports_of(path)
        return
    wrong = sorted(imported for imported in imports_of(path) if not is_allowed(importer, imported))
    assert not wrong, f"{importer} imports {wrong}"


def test_the_rule_itself_forbids_what_it_should():
    for importer, imported in (
        ("models.gpt2", "train.step"), ("kernels.attention", "layers.mlp"), ("data.text", "tasks.language"),
        ("train.step", "data.text"), ("tasks.language", "train.loop"), ("layers.mlp", "data.order"),
        ("train.step", "modes"), ("data.order", "recipe"), ("vram.plan", "compare.table"),
    ):  # fmt: skip
        assert not is_allowed(importer, imported), (importer, imported)
    assert is_allowed("tasks.language", "kernels.attention") and is_allowed("modes", "train.loop")
    assert is_allowed("compare.table", "vram.plan") and is_allowed("main", "compare.table")


def test_the_twin_stands_alone():
    """It runs in a Python that has torch, and may have neither jax nor jaxvram."""
    twin = [path for path in MODULES if "twin" in path.parts]
    assert twin
    for path in twin:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"jax", "jaxlib", "flax", "jaxvram"}, path
    assert not [p for p in MODULES if p not in twin and any(n.startswith("compare.twin") for n in imports_of(p))]


def test_launch_is_the_door_and_configs_read_dataclasses_alone():
    assert imports_of(ROOT / "launch.py") == {"main"}
    for path in (ROOT / "configs").glob("*.py"):
        assert not {n for n in imports_of(path) if n.split(".")[0] in ("main", "modes", "convert", "kernels", "layers")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(MODULES[path]))
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= 420
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 65, f"{node.name}, line {node.lineno}"


def test_nothing_is_left_to_be_done():
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")))
    files = [*MODULES, ROOT / "launch.py", *(ROOT / "configs").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    left = [
        f"{path}:{n}" for path in files for n, line in enumerate(path.read_text().splitlines(), 1) if words.search(line)
    ]
    assert not left


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
