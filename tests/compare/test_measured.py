"""Both sides measured: on the CPU for real, on a card that is made up, and all that can go wrong on the way."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from parity import needs_transformers

from jaxvram import modes, recipe
from jaxvram.compare import child, measured, measured_side, measured_table, pytorch_side, sides
from jaxvram.errors import UserError
from jaxvram.main import main
from jaxvram.models import name_of
from jaxvram.vram import cards, nvidia_smi

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
SMALL = ("--config.model.n_layer=1", "--config.train.batch_size=4", "--config.model.vocab_size=500")
RTX4070 = cards.find("rtx4070")
GIB, MIB = 2**30, 2**20


def script(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def launch(*arguments):
    return main(["launch.py", "--mode=compare", "--measure", *arguments])


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    """(what is printed, the run folder) of a GPT-2 of one layer, both sides, a step or two of each."""
    folder, environment = tmp_path_factory.mktemp("run"), {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "WARM_UP", 1)
        patch.setattr(measured, "STEPS", 2)
        for name, value in environment.items():
            patch.setenv(name, value)
        out = io.StringIO()
        patch.setattr(sys, "stdout", out)
        assert launch(f"--config={CONFIGS / 'gpt2.py'}:tiny", *SMALL, f"--workdir={folder}") == 0
    return out.getvalue(), folder


@pytest.mark.slow
@needs_transformers
def test_a_cpu_tells_time_alone(on_the_cpu):
    said, folder = on_the_cpu
    record = json.loads((folder / "compare_measured.json").read_text())
    assert record["way"] == "measured" and record["unit"] == "tokens" and record["steps"] == {"warm_up": 1, "timed": 2}
    assert not any(word in json.dumps(record) for word in ("_bytes", "owners", "planned"))
    assert not (folder / "compare_measured.png").exists()
    refused = record["sides"].pop("compile")
    assert "TORCHDYNAMO_DISABLE" in refused["refused"]
    assert list(record["sides"]) == [sides.OURS, sides.OURS_8BIT, *pytorch_side.VARIANTS]
    for side in record["sides"].values():
        assert side["per_second"] == pytest.approx(4 * 64 / side["seconds_per_step"])
        assert 0 < side["seconds_per_step"] < 60
    assert "time alone is measured" in said and "GiB" not in said
    assert measured_table.text(record | {"sides": record["sides"] | {"compile": refused}}) in said


@pytest.mark.slow
@needs_transformers
def test_our_side_and_theirs_took_the_same_step(on_the_cpu):
    record = json.loads((on_the_cpu[1] / "compare_measured.json").read_text())
    assert record["step"]["batch_size"] == 4 and record["step"]["tokens"] == 64
    # Ours: V (500, 512 with padding) and T rows, a layer's four matrices with biases, three norms.
    rows = 512 * 64 + 64 * 64 + 12 * 64 * 64 + (3 + 1 + 4 + 1) * 64 + 3 * 2 * 64
    assert record["parameters"]["all"] - record["parameters"]["extra"] == rows


@pytest.fixture
def fake_card(monkeypatch, tmp_path):
    """A machine with an RTX 4070 as the fourth of its cards; everyone who is asked writes a line into the log."""
    bin_, log = tmp_path / "bin", tmp_path / "log"
    bin_.mkdir()
    smi = f"""#!/bin/sh
case "$*" in *--id=3*) ;; *) exit 6 ;; esac
echo smi >> {log}
if [ $(grep -c smi {log}) = 1 ]; then used=500; else used={500 + 4096 + 400}; fi
echo "{RTX4070.description}, 550.54.14, $used"
"""
    script(bin_ / "nvidia-smi", smi)
    twin = f"""#!{sys.executable}
import json, os, sys
request = json.load(sys.stdin)
assert request["way"] == "measured" and request["device"] == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
assert request["warm_up"] == 1 and request["timed"] == 2
open({str(log)!r}, "a").write(f"torch {{len(request['variants'])}}\\n")
said = lambda gib, s: {{"peak_bytes": gib << 30, "owners": {{"parameters": gib << 30}}, "seconds_per_step": s}}
every = {{"eager": said(12, 8.0), "flash": said(6, 4.0), "flash+checkpoint": {{"refused": "out of memory: a card"}}}}
variants = {{name: every.get(name, said(5, 2.0)) for name in request["variants"]}}
parameters = {{"all": 1, "trained": 1, "difference": "", "extra": 0}} if variants else None
json.dump({{"versions": {{"torch": "2"}}, "device": "x", "parameters": parameters, "variants": variants}}, sys.stdout)
"""
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # ours compiles in a third of the time
    monkeypatch.setattr(measured, "on_gpu", lambda: True)
    monkeypatch.setattr(measured, "OUR_SIDE", (sys.executable, str(HERE / "on_fake_card.py")))
    monkeypatch.setattr(measured, "WARM_UP", 1)
    monkeypatch.setattr(measured, "STEPS", 2)
    monkeypatch.setattr(sides, "plan_ours", lambda *_: {"peak_bytes": 5 * GIB // 2})
    return script(tmp_path / "torch_python", twin)


def test_on_a_card_both_sides_tell_memory_and_time(fake_card, tmp_path, capsys):
    config = f"--config={CONFIGS / 'gpt2.py'}:tiny"
    assert launch(config, *SMALL, f"--torch-python={fake_card}", f"--workdir={tmp_path}") == 0
    record = json.loads((tmp_path / "compare_measured.json").read_text())
    assert record["way"] == "measured" and record["driver"] == "550.54.14" and record["card"] == "rtx4070"
    assert record["gpu"] == RTX4070.description and record["capacity_bytes"] == pytest.approx(RTX4070.capacity_bytes, abs=2)
    ours = record["sides"][sides.OURS]
    assert ours["peak_bytes"] == 3 * GIB and ours["peaks"] == {"compile": GIB, "init": 2 * GIB, "steps": 3 * GIB}
    assert ours["outside_bytes"] == 400 * MIB and record["planned_bytes"] == 5 * GIB // 2
    assert sum(ours["owners"].values()) == 3 * GIB and ours["compiled_bytes"] > 0
    numbers = 512 * 64 + 64 * 64 + 12 * 64 * 64 + 9 * 64 + 3 * 2 * 64
    assert ours["owners"]["parameters"] == 4 * numbers
    assert ours["owners"]["optimizer state"] == pytest.approx(8 * numbers, rel=0.01)
    assert record["sides"]["eager"]["per_second"] == 4 * 64 / 8.0
    # PyTorch's errors come first, then ours, each alone on the card, then PyTorch.
    log = (tmp_path / "log").read_text().split("\n")
    assert log == ["torch 0", "smi", "jaxvram", "smi", "jaxvram", "smi", "torch 5", ""]
    said = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "measured on NVIDIA GeForce RTX 4070, driver 550.54.14" in said and "planned" not in said
    assert "3.00 GiB" in lines["jaxvram"] and "0.25 of it" in lines["PyTorch eager"] and " 32 " in lines["PyTorch eager"]
    assert lines["PyTorch flash+checkpoint"].endswith("out of memory: a card")
    assert "the plan for this card says 2.50 GiB for jaxvram: 1.200 of that was measured" in said
    assert "the last is the steps' own" in said and "it holds 0.39 GiB" in said
    assert (tmp_path / "compare_measured.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_without_a_plan_or_nvidia_smi(fake_card, tmp_path, monkeypatch, tiny_recipe):
    def refuse(*_):
        raise UserError("no compiler here")

    monkeypatch.setattr(sides, "plan_ours", refuse)
    script(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    built = tiny_recipe()
    record = measured.compare(built, modes.make_task(built, with_data=False), fake_card)
    assert record["driver"] is None and record["sides"][sides.OURS]["outside_bytes"] is None
    said = measured_table.text(record)
    assert "no plan to compare with: no compiler here" in said and "driver" not in said and "it holds" not in said


def test_a_mark_from_before_the_steps_is_no_peak_of_theirs():
    peaks = lambda *gib: {"peaks": dict(zip(("compile", "init", "steps"), (n * GIB for n in gib), strict=True))}
    assert measured_table.is_of_steps(peaks(1, 2, 3))
    assert not measured_table.is_of_steps(peaks(3, 3, 3)) and not measured_table.is_of_steps(peaks(1, 3, 3))


def test_a_cpu_machine_measures_no_card(monkeypatch):
    monkeypatch.setattr(measured, "gpu_visible", lambda: True)
    for platforms, cards_, on_gpu in (
        ("", "0", True), ("cuda,cpu", "1", True), ("", "GPU-5c1e", True), ("cpu", "0", False), ("", "", False),
        ("", "-1", False),
    ):  # fmt: skip
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards_)
        assert measured.on_gpu() is on_gpu, (platforms, cards_)
    monkeypatch.setattr(measured, "gpu_visible", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not measured.on_gpu()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_survives_the_journey(path):
    built = recipe.build(*recipe.load(str(path)))
    sent = json.loads(json.dumps(built.as_dict()))
    assert recipe.of_sections(sent, name_of(built.model)) == built


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", ["llama_qlora", "dit"])
def test_our_side_steps_with_frozen_weights_and_with_images(name, monkeypatch, capsys):
    """QLoRA's base in NF4 and its packed examples; images with their classes. The loss is a number: none of it is absurd."""
    built = recipe.build(*recipe.load(f"{CONFIGS / name}.py:tiny"))
    train = dataclasses.replace(built.train, batch_size=2)
    built = dataclasses.replace(built, model=dataclasses.replace(built.model, n_layer=1), train=train)
    task = modes.make_task(built, with_data=False)
    losses, make_program = [], measured_side.make_program

    def watched(*arguments):
        """The same program, whose compiled step writes its losses down."""
        program = make_program(*arguments)
        jitted = program.step

        def compile_(*shapes):
            compiled = jitted.lower(*shapes).compile()

            def step(state, batch):
                state, metrics = compiled(state, batch)
                losses.append(float(metrics["loss"]))
                return state, metrics

            step.memory_analysis = compiled.memory_analysis
            return types.SimpleNamespace(compile=lambda: step)

        program.step = types.SimpleNamespace(lower=compile_)
        return program

    monkeypatch.setattr(measured_side, "make_program", watched)
    model = dataclasses.replace(built, model=task.model.cfg).as_dict()
    request = {"way": "measured", "device": "cpu", "warm_up": 1, "timed": 2, "gpu": "0", "used_bytes": None}
    answer = measured_side.answer_to(request | {"kind": name_of(built.model), "recipe": model})
    assert answer.keys() == {"seconds_per_step"} and answer["seconds_per_step"] > 0
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[0] > 0
    assert capsys.readouterr().err == "measured compiling\nmeasured 1 + 2 steps\n"


def test_random_batches_are_of_the_datas_kind():
    task = lambda name: modes.make_task(recipe.build(*recipe.load(f"{CONFIGS / name}.py:tiny")), with_data=False)
    packed, images = task("llama_qlora"), task("dit")
    batch = measured_side.random_batch(packed, 2)
    assert (batch["segments"] == 1).all() and batch["tokens"].dtype == np.int32
    vocab_size = packed.model.cfg.vocab_size
    assert 0.9 * vocab_size < batch["tokens"].max() < vocab_size and (batch["tokens"] != batch["targets"]).any()
    batch = measured_side.random_batch(images, 64)
    assert set(batch["labels"]) == set(range(images.model.cfg.num_classes)) and 0.9 < batch["images"].std() < 1.1


def test_random_weights_take_no_memory():
    spec = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    large = measured_side.random_like(spec((300, 1000, 1000), np.dtype(np.float32)))
    assert large.shape == (300, 1000, 1000) and 0.01 < large[7].std() < 0.03
    assert np.ptp([layer[0, 0] for layer in large]) > 0  # no two layers are alike
    owner = large
    while owner.base is not None:
        owner = owner.base
    assert owner.nbytes < 5 * MIB
    codes = measured_side.random_like(spec((2, 5000), np.dtype(np.uint8)))
    assert codes.dtype == np.uint8 and codes.max() > 250
    assert measured_side.random_like(spec((), np.dtype(np.float32))).shape == ()


NO_CUDA = (
    "error: measuring needs a GPU and a PyTorch built for it; this is torch 2.13.0+cpu, which sees none "
    "(way=planned needs neither)"
)


@pytest.mark.parametrize(
    ("arguments", "said_by_torch", "message"),
    [
        (["--search=batch"], None, "--measure and --search: "),
        (["--card=rtx4070"], None, "leave out --card=rtx4070"),
        ([], "error: P has no torch: P -m pip install torch", "has no torch.*--torch-python=TORCH/bin/python"),
        ([], NO_CUDA, "this is torch 2.13.0.cpu.*--torch-python=PYTHON names one that has it: python3 -m venv"),
    ],
)
def test_what_cannot_be_measured_ends_in_a_line(arguments, said_by_torch, message, fake_card, tmp_path, capsys):
    python = script(tmp_path / "other", f"#!/bin/sh\necho '{said_by_torch}' >&2\nexit 2\n")
    config = f"--config={CONFIGS / 'mingpt_sort.py'}:tiny"
    assert launch(config, f"--torch-python={python}", f"--workdir={tmp_path / 'run'}", *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and re.search(message, err), err
    assert not (tmp_path / "run").exists() and not (tmp_path / "log").exists()  # nobody was kept waiting for ours


def test_jax_without_cuda_beside_a_card(fake_card, monkeypatch, tiny_recipe):
    monkeypatch.setattr(measured, "OUR_SIDE", (sys.executable, "-m", "jaxvram.compare.measured_side"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    built = tiny_recipe()
    with pytest.raises(UserError, match=r"jaxvram's side: JAX .* does not see the GPU.*cuda12"):
        measured.compare(built, modes.make_task(built, with_data=False), fake_card)


def test_what_does_not_fit_is_a_line(monkeypatch, capsys):
    def full(request):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying\nto allocate 9 GiB")

    monkeypatch.setattr(measured_side, "answer_to", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    assert measured_side.main() == 2
    said = "error: out of memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB\n"
    assert capsys.readouterr().err == said


def test_a_side_that_is_killed_says_so():
    with pytest.raises(child.ChildError, match=r"signal 9 \(the machine's memory was full\?\)"):
        child.ask(["sh", "-c", "kill -9 $$"], {"way": "measured"}, dict(os.environ))


def test_nvidia_smi_may_keep_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.look("0") is None
    script(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'NVIDIA GH200, 560.1, [N/A]'\n")
    assert nvidia_smi.look("0") == nvidia_smi.Seen("NVIDIA GH200", "560.1", None)
    script(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'No devices were found'\n")
    assert nvidia_smi.look("0") is None


def test_compile_is_a_variant_of_what_is_measured_alone():
    cfg = recipe.build(*recipe.load(f"{CONFIGS / 'mamba.py'}:tiny")).model
    assert "compile" in pytorch_side.variants_of(cfg, "measured") and "compile" not in pytorch_side.variants_of(cfg)


@needs_transformers
def test_compile_asks_no_attention_of_mamba():
    """transformers refuses to build one that is asked for flash attention."""
    cfg = recipe.build(*recipe.load(f"{CONFIGS / 'mamba2.py'}:tiny")).model
    fields = {"kind": "mamba2"} | dataclasses.asdict(cfg)
    code = f"""
import models, requested
for name in ("compile", "eager"):
    print(models.build({fields!r}, None, requested.VARIANTS[name], "cpu", False).counts()["all"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=pytorch_side.SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled, eager = done.stdout.split()
    assert compiled == eager
