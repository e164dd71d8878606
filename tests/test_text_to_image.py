"""The command line from captions to pictures: a cache prepared, a few steps on it, samples of prompts."""

import json
import pathlib

import pytest
from PIL import Image

from jaxvram.main import main
from jaxvram.train import metrics

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHAPES = ["--mode=prepare", "--input=shapes", "--count=40", "--held_out_captions=16", "--autoencoder=random", "--out=cache"]
FEW = [
    "--config.model.width=8", "--config.model.groups=4", "--config.model.multipliers=(1,)", "--config.model.text_layers=1",
    "--config.model.attention_levels=(0,)", "--config.model.context_dim=8", "--config.model.text_heads=2",
    "--config.train.steps=2", "--config.train.batch_size=4",
    "--config.train.log_every=1", "--config.eval.every=0", "--config.eval.batches=1", "--config.eval.batch_size=4",
    "--config.task.score_samples=4", "--config.sample.steps=2", "--config.sample.num_samples=2",
    "--config.sample.batch_size=4", "--config.optimizer.warmup_steps=1", "--workdir=run",
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, no_report):
    monkeypatch.chdir(tmp_path)


def launch(*arguments):
    return main(["launch.py", *arguments])


def fails(capsys, *arguments):
    capsys.readouterr()
    assert launch(*arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_captions_as_bytes_on_prepared_latents(capsys):
    assert launch(*SHAPES, "--image_size=64") == 0
    assert "40 images in 1 shard(s), 0 skipped; train on them with --config.data.name=latents" in capsys.readouterr().out
    recipe = [f"--config={CONFIGS}/stable_diffusion.py:tiny", "--config.data.path=cache", *FEW]
    assert launch(*recipe) == 0
    logged = metrics.read("run")
    assert len([line for line in logged if "split" not in line]) == 2 and "colour_and_shape" in json.dumps(logged)
    asked = ["--prompt=a red circle at the top | a blue cross in the centre"]
    assert launch(*recipe, "--mode=sample", *asked, "--config.sample.negative_prompt=a green square") == 0
    assert "a red circle at the top, a blue cross in the centre" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=shapes", "--count=5"], "--count=5 is too few: take 10 or more"),
        (["--input=shapes", "--image_size=20"], "image_size=20 must be a multiple of the autoencoder's 8 pixels"),
        (["--input=pictures", "--count=40"], "--count is for --input=shapes"),
        (["--input=pictures", "--image_size=16"], "1 of 2 pictures in pictures have no caption (1.png): write a .txt"),
        (["--input=shapes", "--text_encoder=nowhere"], "nowhere"),
        (["--input=shapes", "--autoencoder=randm"], "the autoencoder 'randm' is unknown, and no folder; did you mean"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(arguments, message, capsys):
    pathlib.Path("pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16)).save(f"pictures/{i}.png")
    pathlib.Path("pictures/0.txt").write_text("a black square")
    assert message in fails(capsys, "--mode=prepare", "--autoencoder=random", "--out=cache", *arguments)
    assert not pathlib.Path("cache").exists()
