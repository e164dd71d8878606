"""Captions to features: transformers' own numbers and tokens, layer by layer as at once, and nothing cut in silence."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import quick
import text_folders
from text_folders import CAPTIONS

from jaxvram.convert import text_encoder as convert
from jaxvram.data import text_encoders
from jaxvram.data.caption_tokenizers import ByteTokens, CLIPTokens, T5Tokens
from jaxvram.data.text_encoders import load_text_encoder
from jaxvram.errors import UserError
from jaxvram.models.text_encoder import CLIPTextConfig, T5Config

S = 50


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with CLIP, one with a T5 of two files, and a small encoder of ours."""
    root = tmp_path_factory.mktemp("encoders")
    text_folders.clip(root / "clip" / "text_encoder")
    text_folders.clip_tokenizer(root / "clip" / "tokenizer")
    text_folders.t5(root / "t5" / "text_encoder", shards=2)
    text_folders.t5_tokenizer(root / "t5" / "tokenizer")
    text_folders.small(root / "small")
    return root


@pytest.fixture(autouse=True)
def unoptimised(monkeypatch):
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=quick.UNOPTIMISED))


def theirs(folder, kind):
    """transformers' (features, tokens) of the captions, unpadded rows of features as SD and PixArt ask for them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if kind == "clip":
        model, tokenizer = transformers.CLIPTextModel, transformers.CLIPTokenizer
    else:
        model, tokenizer = transformers.T5EncoderModel, transformers.T5Tokenizer
    model, tokenizer = (of.from_pretrained(folder / at) for of, at in ((model, "text_encoder"), (tokenizer, "tokenizer")))
    made = tokenizer(CAPTIONS[:4], padding="max_length", max_length=S, return_tensors="pt")
    mask = None if kind == "clip" else made["attention_mask"]
    with torch.no_grad():
        out = model.eval()(made["input_ids"], attention_mask=mask).last_hidden_state.numpy()
    return out, made["input_ids"].numpy()


@pytest.mark.parametrize(("kind", "bound"), [("clip", 1e-3), ("t5", 2e-2)])  # float16; bf16
def test_features_are_transformers(folders, kind, bound):
    want_NxSxE, tokens_NxS = theirs(folders / kind, kind)
    encoder = load_text_encoder(folders / kind, S)
    assert (encoder._tokens.encode(CAPTIONS[:4])[0] == tokens_NxS).all()
    got_NxSxE, length_N = encoder.encode(CAPTIONS[:4])
    assert got_NxSxE.dtype == np.float16 and got_NxSxE.shape == (4, S, encoder.width) and length_N.dtype == np.int32
    assert (length_N == S).all() if kind == "clip" else length_N[3] == 1
    counts = (np.arange(S) < length_N[:, None])[..., None]
    assert quick.relative_error(got_NxSxE, want_NxSxE * counts) < bound


def test_the_same_tokenizer_as_tokenizer_json(folders, tmp_path):
    """transformers writes it; its ids are those of the older files."""
    transformers = pytest.importorskip("transformers")
    for kind, tokenizer, ours, V in (
        ("clip", transformers.CLIPTokenizer, CLIPTokens, text_folders.CLIP_VOCABULARY),
        ("t5", transformers.T5Tokenizer, T5Tokens, text_folders.T5["vocab_size"]),
    ):
        tokenizer.from_pretrained(folders / kind / "tokenizer").save_pretrained(tmp_path / kind)
        assert (tmp_path / kind / "tokenizer.json").is_file()
        old, new = (ours(folder, S, V) for folder in (folders / kind / "tokenizer", tmp_path / kind))
        # the last has marks in it: there, T5's library makes one unknown token more of them, but no end
        same = CAPTIONS if kind == "clip" else CAPTIONS[:4]
        assert all((a == b).all() for a, b in zip(old.encode(same), new.encode(same), strict=True)), kind
        assert kind == "clip" or [(of.encode(CAPTIONS[4:])[0] == 1).sum() for of in (old, new)] == [1, 1]


def test_a_caption_cannot_end_itself(folders):
    """What looks like a mark is text: one of them stands in a row, at its end."""
    clip, t5 = (load_text_encoder(folders / kind, S)._tokens for kind in ("clip", "t5"))
    row = clip.encode(["a <|endoftext|> b"])[0][0].tolist()
    assert row.index(1) == max(i for i, token in enumerate(row) if token > 1) + 1
    tokens, length = t5.encode(["a </s> b"])
    assert (tokens[0, : length[0]] == 1).sum() == 1


def test_padding_of_stable_diffusion_2(folders, tmp_path):
    folder = shutil.copytree(folders / "clip" / "tokenizer", tmp_path / "tokenizer")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    tokens, length = CLIPTokens(folder, S, 600).encode(["a cat"])
    assert tokens[0, -1] == json.loads((folder / "vocab.json").read_text())["!"] and length[0] == S


def test_bytes():
    tokens, length = ByteTokens(8).encode(["aü", ""])
    assert tokens.tolist() == [[256, 97, 195, 188, 257, 258, 258, 258], [256, 257] + [258] * 6] and length.tolist() == [5, 2]
    assert tokens.dtype == length.dtype == np.int32
    with pytest.raises(UserError, match="'abcdefg' takes 9 tokens, and the text encoder reads 8"):
        ByteTokens(8).encode(["a", "abcdefg"])


@pytest.mark.parametrize("kind", ["t5", "small", "clip"])
def test_chunks_and_batches_change_nothing(folders, monkeypatch, kind):
    """A caption's features do not depend on what is encoded beside it, however that is divided."""
    encoder = load_text_encoder(folders / kind, S)
    captions = ["red", "circle", "above", "blue", "square", "green", "triangle"]
    monkeypatch.setattr(text_encoders, "BATCH", 4)
    want, lengths = encoder.encode(captions)
    assert np.abs(np.diff(want, axis=0)).max((1, 2)).min() > 0  # each has its own
    monkeypatch.setattr(text_encoders, "CHUNK_BYTES", 1)  # a batch a chunk
    monkeypatch.setattr(text_encoders, "BATCH", 2)
    got, _ = encoder.encode(captions)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
    one, length = encoder.encode(captions[3:4])
    np.testing.assert_allclose(one[0], want[3], rtol=0, atol=2e-3)
    assert length[0] == lengths[3]


def test_layer_by_layer_is_the_whole_model_and_holds_two_layers(folders, monkeypatch):
    """The same numbers as T5Encoder at once; never more than two layers are alive."""
    encoder = load_text_encoder(folders / "t5", S)
    params, cfg = convert.load_params(folders / "t5")
    tokens, lengths = encoder._tokens.encode(CAPTIONS)
    module = convert.MODULE_OF[T5Config](cfg)
    whole = jax.jit(lambda params: module.apply({"params": params}, tokens, lengths))(params)
    alive, most = [], []

    class Counted(np.ndarray):
        pass

    read = convert.TextWeights.layer

    def counting(self, index):
        import gc
        import weakref

        gc.collect()
        layer = read(self, index)
        leaf = layer["down"]["kernel"].view(Counted)
        layer["down"]["kernel"] = leaf
        alive.append(weakref.ref(leaf))
        most.append(sum(of() is not None for of in alive))
        return layer

    put = jax.device_put
    monkeypatch.setattr(convert.TextWeights, "layer", counting)
    # the tree that was read stays what is held, so that its life can be followed
    monkeypatch.setattr(jax, "device_put", lambda tree: tree if "down" in tree else put(tree))
    got, _ = encoder.encode(CAPTIONS)
    counts = (np.arange(S) < lengths[:, None])[..., None]
    assert quick.relative_error(got, np.where(counts, whole, 0)) < 1e-2
    assert len(most) == 3 and max(most) <= 2


def test_a_small_encoder_comes_back_as_it_was_saved(folders):
    params, cfg = convert.load_params(folders / "small")
    want = text_folders.random_weights(cfg)
    assert jax.tree.structure(params) == jax.tree.structure(want)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True))
    features, lengths = load_text_encoder(folders / "small").encode(["a cat"])
    tokens, _ = ByteTokens(S).encode(["a cat"])
    out = convert.MODULE_OF[type(cfg)](cfg).apply({"params": params}, tokens, lengths)
    assert quick.relative_error(features[:, :7], out[:, :7]) < 1e-3 and not features[:, 7:].any() and lengths.tolist() == [7]


def test_text_half_of_a_whole_clip(folders, tmp_path):
    """config.json nests the sizes; the tensors of the other half do no harm."""
    folder = shutil.copytree(folders / "clip" / "text_encoder", tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text_folders.CLIP}))
    params, cfg = convert.load_params(folder)
    want, _ = convert.load_params(folders / "clip")
    assert isinstance(cfg, CLIPTextConfig) and cfg.n_embd == 12
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True))


def test_identity_tells_encoders_apart(folders, tmp_path):
    """A copy is the same encoder; one changed row of one tensor's samples, another tokenizer or other sizes are not."""
    was = load_text_encoder(folders / "clip").identity
    copy = shutil.copytree(folders / "clip", tmp_path / "copy")
    assert load_text_encoder(copy).identity == was and set(was) == {"name", "fingerprint"}
    with open(copy / "tokenizer" / "merges.txt", "a") as file:
        file.write("\n")
    assert load_text_encoder(copy).identity != was
    assert load_text_encoder(text_folders.small(tmp_path / "other", n_layer=1)).identity != was


ERRORS = {
    "no folder": (lambda f, t: t / "nowhere", "no such folder"),
    "no config": (lambda f, t: t, "it is no folder of a text encoder"),
    "another model": (lambda f, t: _config(t, {"model_type": "gpt2"}), "of 'gpt2', which is no text encoder"),
    "an autoencoder": (lambda f, t: _config(t, {"_class_name": "AutoencoderKL"}), "of 'AutoencoderKL', which is no text"),
    "t5 of version 1.0": (lambda f, t: _config(t, {"model_type": "t5"}), "feed_forward_proj=relu is no T5 of version 1.1"),
    "damaged": (lambda f, t: _config(t, text_folders.CLIP | {"hidden_size": "x"}), "is damaged: hidden_size='x'"),
    "no tokenizer of clip": (lambda f, t: _without(f / "clip", t), "no tokenizer: CLIP's is tokenizer.json, or vocab.json"),
    "no tokenizer of t5": (lambda f, t: _without(f / "t5", t), "has no tokenizer: T5's is spiece.model"),
    "another's tokenizer": (lambda f, t: _swapped(f, t), r"has \d+ tokens, the text encoder 140: not its own"),
    "no weights": (lambda f, t: _without(f / "clip", t, "text_encoder", "model.safetensors"), "has no model.safetensors"),
}


def _config(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def _without(folder, tmp_path, part="tokenizer", file=None):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in (copy / part).iterdir():
        if file in (None, path.name):
            path.unlink()
    return copy


def _swapped(folders, tmp_path):
    copy = _without(folders / "t5", tmp_path)
    pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folders / "clip" / "tokenizer").save_pretrained(
        copy / "tokenizer"
    )
    return copy


@pytest.mark.parametrize("case", ERRORS)
def test_errors(folders, tmp_path, case):
    make, message = ERRORS[case]
    with pytest.raises(UserError, match=message):
        load_text_encoder(make(folders, tmp_path))


def test_lengths(folders):
    assert [load_text_encoder(folders / kind).length for kind in ("clip", "t5", "small")] == [S, 120, S]
    for kind in ("clip", "small"):
        with pytest.raises(UserError, match=r"context_length=51: .* reads 2 to 50 tokens"):
            load_text_encoder(folders / kind, 51)
    assert load_text_encoder(folders / "t5", 300).encode(["a"])[0].shape == (1, 300, 12)
    with pytest.raises(UserError, match=r"takes .* tokens, and the text encoder reads 4: shorten it"):
        load_text_encoder(folders / "clip", 4).encode(["a red circle above a blue square"])
    assert load_text_encoder(folders / "small").encode([])[0].shape == (0, S, 8)
