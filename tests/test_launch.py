"""The command line: every mistake ends as one line on stderr with status 2 and leaves nothing behind; every mode works."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxvram.main import main
from jaxvram.train import metrics

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = pathlib.Path(__file__).parents[1]
SORT, SHAKESPEARE = (f"--config={ROOT}/configs/{name}.py" for name in ("mingpt_sort", "nanogpt_shakespeare"))
SMALL = (
    "--config.model.n_layer=1", "--config.model.n_head=2", "--config.model.n_embd=8", "--config.train.batch_size=4",
    "--config.train.steps=6", "--config.train.log_every=2", "--config.eval.every=3", "--config.eval.batches=1",
)  # fmt: skip
TEXT = (f"{SHAKESPEARE}:tiny", *SMALL, "--config.model.n_layer=1", "--config.model.block_size=8")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A working folder of its own, so that default run folders are seen, and no download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXVRAM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)


def launch(*arguments):
    return main(["launch.py", *arguments])


def fails(capsys, *arguments):
    """The one line on stderr of a command that must fail cleanly."""
    before = sorted(pathlib.Path().rglob("*"))
    capsys.readouterr()
    assert launch(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in out, err
    assert sorted(pathlib.Path().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], None),
        (["--config.train.steps=3"], "--config=configs/NAME.py is missing"),
        ([SORT.replace("mingpt_sort", "mingpt_srt")], "mingpt_srt.py'; did you mean '.*configs/mingpt_sort.py'"),
        (["--config=nowhere/at_all.py"], "there is no recipe 'nowhere/at_all.py'"),
        ([f"{SHAKESPEARE}:cpuu"], "variant 'cpuu' is unknown; did you mean 'cpu'"),
        ([SORT, "--mode=trian"], "--mode=trian is unknown; did you mean 'train'"),
        ([SORT, "--checkpoint=bets"], "--checkpoint=bets is unknown; did you mean 'best'"),
        ([SORT, "--mode=plan", "--card=rtx407"], "did you mean 'rtx4070'"),
        ([SORT, "--config.model.n_haed=3"], "config.model.n_haed is no field of this recipe; did you mean 'n_head'"),
        ([SORT, "--config.modle.n_head=3"], "config.modle is no field of this recipe; did you mean 'model'"),
        ([SORT, "--config.model.n_head.x=3"], "config.model.n_head.x is no field"),
        ([SORT, "--config.model.n_head=abc"], "config.model.n_head.*abc"),
        ([SORT, "--config.model.n_head=1.5"], "config.model.n_head.*1.5"),
        ([SORT, "--config.model.tie_head=maybe"], "config.model.tie_head.*maybe"),
        ([SORT, "--config.model=1"], "config.model is a section"),
        ([SORT, "--config.train.steps"], "needs a value"),
        ([SORT, "--wrokdir=x"], "'--wrokdir=x' is no flag"),
        ([SORT, "steps=3"], "'steps=3' is no flag"),
        ([SORT, "--num_processes=two"], "num_processes.*two"),
        ([SORT, "--num-processes=two"], "num_processes.*two"),
        ([SORT, "--coordinator=localhost:1"], "needs --num_processes and --process_id"),
        ([SORT, "--config.model.n_head=5"], "n_embd=48 is not a multiple of model.n_head=5"),
        ([SORT, "--config.model.activation=relu6"], "model.activation='relu6' is unknown"),
        ([SORT, "--config.model.block_size=12"], "block_size=12 does not fit the sort problem: set it to 11"),
        ([SORT, "--config.model.vocab_size=2"], "the data has 3 tokens, the model only model.vocab_size=2"),
        ([SORT, "--config.train.microbatch_size=7"], "train.batch_size=64 is not a multiple of train.microbatch_size=7"),
        ([SORT, "--config.train.log_every=0"], "log_every"),
        ([SORT, "--config.optimizer.schedule=cosin"], "did you mean 'cosine'"),
        ([SORT, "--config.optimizer.groups.linear.params=.*bias"], "is in the optimizer groups linear and plain"),
        ([SORT, "--config.mesh.fsdp=2"], "mesh data=-1 x fsdp=2 x expert=1 x tensor=1 does not make 1 device"),
        ([SORT, "--config.train.seed=9223372036854775808"], "train.seed=9223372036854775808"),
        ([SORT, "--config.model.name=gpt3"], "model.name='gpt3' is unknown; did you mean 'gpt2'"),
        (["--mode=prepare", "--input=poem.txt", "--out=x", "--workers=-1"], "workers=-1"),
        ([SORT, "--config.data.name=sorts"], "data.name='sorts' is unknown; did you mean 'sort'"),
        ([SORT, "--config.sample.temperature=-1"], "temperature"),
        ([SORT, "--config.train.init_from=nowhere"], "nowhere"),
        ([SORT, "--mode=eval"], "no checkpoint in runs/mingpt_sort; train first"),
        ([SORT, "--mode=sample", "--workdir=nowhere"], "no checkpoint in nowhere"),
        ([SORT, "--mode=export"], "--out=DIR"),
        ([SORT, "--mode=export", "--out=x"], "no checkpoint"),
        ([SORT, "--mode=export", "--out=x.pth"], "--out=x.pth: gpt2's weights are exported to a folder, --out=DIR"),
        (["--mode=prepare"], "--input"),
        (["--mode=prepare", "--input=gone.txt", "--out=x", "--tokenizer=char"], "gone.txt"),
        ([SORT, "--mode=prepare", "--input=a", "--out=b"], "reads no recipe"),
        ([SORT, "--mode=kernels", "--card=rtx4070"], "reads no recipe"),
        (["--mode=build"], "needs --input=EXPERTS.toml"),
        ([SORT, "--mode=build", "--input=a.toml", "--out=b"], "--mode=build reads no recipe"),
        (["--mode=build", "--input=gone.toml", "--out=b"], "--input=gone.toml does not exist"),
        ([SORT, "--config.mesh.expert=2"], "does not make 1 device"),
        ([*TEXT, "--config.data.path=gone.txt"], "data.path=gone.txt does not exist"),
        ([*TEXT, "--config.data.path=empty.txt"], "empty.txt"),
        ([*TEXT, "--config.data.path=poem.txt", "--config.sample.prompt=\u2603"], "sample.prompt=.*outside the vocabulary"),
        ([*TEXT, "--config.data.path=poem.txt", "--config.sample.prompt="], "sample.prompt is empty"),
        ([*TEXT, "--config.data.path=poem.txt", "--config.model.block_size=500"], "smaller block_size"),
        ([*TEXT, "--config.data.path=bad_magic"], "bad_magic"),
    ],
)  # fmt: skip
def test_mistakes(capsys, arguments, message):
    pathlib.Path("empty.txt").write_text(" \n")
    pathlib.Path("bad_magic").mkdir()
    pathlib.Path("bad_magic/train_000.bin").write_bytes(b"12345678" * 300)
    if message is None:
        assert launch() == 0 and "python launch.py --config=" in capsys.readouterr().out
        return
    assert re.search(message, fails(capsys, *arguments))


@pytest.mark.parametrize(
    "body, message",
    [
        ("def get_config(", "SyntaxError"),
        ("import nonsuch", "No module named 'nonsuch'"),
        ("x = 1", "no get_config"),
        ("VARIANTS = ('tiny',)\ndef get_config(v):\n    c = {}\n    return c['model']", "line 4: KeyError"),
        (
            "from jaxvram import recipe\nfrom jaxvram.models.gpt2 import GPT2Config\nVARIANTS = ('tiny',)\n"
            "def get_config(v):\n    return recipe.new(model=GPT2Config(n_heads=2))",
            "line 5: TypeError: .*n_heads",
        ),
        (
            "from jaxvram import recipe\nfrom jaxvram.models.gpt2 import GPT2Config\nVARIANTS = ('tiny',)\n"
            "def get_config(v):\n    c = recipe.new(model=GPT2Config())\n    c.model.n_heads = 2\n    return c",
            "line 6: .*n_heads",
        ),
    ],
)
def test_a_recipe_with_a_mistake(capsys, body, message):
    pathlib.Path("mine.py").write_text(body)
    assert re.search(message, fails(capsys, "--config=mine.py"))


def test_a_real_process_prints_one_line_and_starts_no_backend_of_a_gpu(tmp_path):
    """With the planner installed, JAX's own libraries speak on stderr at import: not through launch.py."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS")}
    command = [sys.executable, str(ROOT / "launch.py"), f"{SORT}:nan"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: variant 'nan' is unknown[^\n]*\n", done.stderr)


def test_help_and_cards(capsys):
    assert launch("--help") == 0 and "--mode=plan" in capsys.readouterr().out
    assert launch("--card=list") == 0 and "rtx4070" in capsys.readouterr().out


def test_train_resume_evaluate_sample(capsys, no_report):
    """A small text, from the first step to samples of one's own, then every way in which the folder no longer fits."""
    text = (*TEXT, "--config.data.path=poem.txt", "--config.sample.max_new_tokens=20", "--workdir=run")
    assert launch(*text) == 0
    out = capsys.readouterr().out
    assert "data: poem.txt: 1,620 tokens to train on" in out and "run folder: run" in out
    assert launch(*text, "--config.train.steps=8") == 0
    assert "from its checkpoint of step 6" in capsys.readouterr().out
    lines = metrics.read("run")
    assert [line["step"] for line in lines if "split" not in line] == [2, 3, 4, 6, 8]
    assert json.loads(pathlib.Path("run/config.json").read_text())["train"]["steps"] == 8

    assert launch(*text, "--mode=eval", "--checkpoint=latest") == 0
    assert json.loads(capsys.readouterr().out) == lines[-1]
    assert launch(*text, "--mode=sample", "--config.sample.prompt=the ", "--config.sample.num_samples=3") == 0
    samples = capsys.readouterr().out
    assert samples.count("-" * 80) == 2 and samples.startswith("the ")
    (file,) = pathlib.Path("run/samples").glob("asked_*")
    assert file.read_text() == samples
    pathlib.Path("prompt.txt").write_text("lazy")
    assert launch(*text, "--mode=sample", "--config.sample.prompt_file=prompt.txt") == 0
    assert capsys.readouterr().out.startswith("lazy")

    assert "outside the vocabulary" in fails(capsys, *text, "--mode=sample", "--config.sample.prompt=\u2603")
    assert "model.n_layer=1, not 2" in fails(capsys, *text, "--config.model.n_layer=2")
    assert re.search(
        "wpe/embedding is .8, 8. float32 there and .16, 8.", fails(capsys, *text, "--config.model.block_size=16")
    )
    assert "was made by nanogpt_shakespeare:tiny, not by mingpt_sort" in fails(capsys, SORT, "--workdir=run")
    assert "opt_state" in fails(capsys, *text, "--config.optimizer.name=lion")
    pathlib.Path("poem.txt").write_text("0123456789" * 500)  # another text, with other characters
    assert "trained with another vocabulary (29 characters" in fails(capsys, *text, "--config.sample.prompt=0")
    pathlib.Path("poem.txt").unlink()  # its vocabulary is known from the run
    assert launch(*text, "--mode=export", "--out=exported") == 0 and pathlib.Path("exported/model.safetensors").exists()
    pathlib.Path("run/config.json").write_text("{")
    assert "run/config.json is damaged" in fails(capsys, *text)


def test_problems_are_sampled_as_problems_and_memory_is_told_in_a_line(capsys, no_report, monkeypatch):
    arguments = (SORT, *SMALL, "--config.task.score_problems=4", "--workdir=run")
    assert launch(*arguments) == 0
    capsys.readouterr()
    assert launch(*arguments, "--mode=sample", "--config.sample.num_samples=2") == 0
    assert len(re.findall(r"^\d{6} -> \d{6}  \((?:right|wrong)", capsys.readouterr().out, re.M)) == 2
    assert launch(*arguments, "--mode=sample", "--config.sample.prompt=0120") == 0
    assert "\n0120" in capsys.readouterr().out

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr("jaxvram.modes.make_task", full)
    assert re.match("error: out of memory .*--mode=fit finds them", fails(capsys, *arguments))


def test_a_damaged_checkpoint(capsys, no_report):
    arguments = (SORT, *SMALL, "--config.task.score_problems=4", "--workdir=run")
    assert launch(*arguments) == 0
    for path in pathlib.Path("run/checkpoints/latest/6/weights/d").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    message = "error: checkpoint .*run/checkpoints/latest/6 is damaged .*delete that folder"
    assert re.match(message, fails(capsys, *arguments))
    assert re.match(message, fails(capsys, *arguments, "--mode=eval", "--checkpoint=latest"))
