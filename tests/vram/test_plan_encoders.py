"""--mode=plan of encoders: from config.json alone, each fits; a T5 is planned as two layers and not as a whole."""

import json

import pytest

from jaxvram import main
from jaxvram.convert import text_encoder
from jaxvram.data import text_encoders
from jaxvram.vram import plan

XXL = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_L = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
}  # fmt: skip

AUTOENCODER = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
    "latent_channels": 4, "in_channels": 3, "out_channels": 3, "scaling_factor": 0.5,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


def folder_of(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_t5_xxl_fits_layer_by_layer(rtx4070, tmp_path):
    """As a whole it would take 8.9 GiB: a layer's program carries two layers' weights, 0.36 GiB each, and no more."""
    found = text_encoder.find(folder_of(tmp_path / "text_encoder", XXL).parent)
    made = plan.make_plan({n: plan.Program(*of) for n, of in text_encoders.programs(found).items()}, rtx4070)
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096)
    assert 2 * layer < made["layer"]["argument_bytes"] < 2 * layer + 0.1 * 2**30
    assert made["layer"]["fits"] and made["layer"]["peak_bytes"] < 1.1 * 2**30
    assert made["layer"]["aliased_bytes"] > layer  # the states, and the layer that is passed through
    assert made["tokens"]["fits"] and 2 * 32128 * 4096 < made["tokens"]["peak_bytes"] < 0.4 * 2**30


@pytest.mark.slow
def test_the_command(rtx4070, tmp_path, capsys):
    clip, autoencoder = folder_of(tmp_path / "clip", CLIP_L), folder_of(tmp_path / "autoencoder", AUTOENCODER)
    encoders = [f"--text_encoder={clip}", f"--autoencoder={autoencoder}"]
    flags = ["--image_size=16", "--card=rtx4070", f"--workdir={tmp_path / 'run'}"]
    assert main.main(["", "--mode=plan", *encoders, *flags]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in ("encode", "decode", "captions")) and said.count("FITS") == 3
    assert (tmp_path / "run" / "plan.png").is_file()
    weights = json.loads((tmp_path / "run" / "plan.json").read_text())["captions"]["argument_bytes"]
    assert 4 * 123_060_480 < weights < 4 * 123_060_480 + 2**20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text_encoder=/nowhere"], "no such folder"),
        (["--autoencoder=random"], "needs no memory of a card"),
        (["--text_encoder={clip}", "--context_length=78"], "reads 2 to 77 tokens"),
        (["--text_encoder={clip}", "--config.model.n_layer=3"], "reads no recipe"),
        ([], "--config=configs/NAME.py is missing"),
    ],
)
def test_errors(tmp_path, capsys, flags, message):
    clip = folder_of(tmp_path / "clip", CLIP_L)
    assert main.main(["", "--mode=plan", "--card=rtx4070", *(flag.format(clip=clip) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
