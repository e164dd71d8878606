"""Captions of a cache to features: each once, none shifted, resumed, and never those of another encoder."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import quick
import text_folders
from kills import killed_after
from PIL import Image

from jaxvram.data import features
from jaxvram.data.autoencoders import RandomAutoencoder
from jaxvram.data.features import prepare_features
from jaxvram.data.images import ImageDataConfig, load
from jaxvram.data.prepare_images import prepare_latents
from jaxvram.data.text_encoders import load_text_encoder
from jaxvram.errors import UserError

S, E, PICTURES = 12, 3, 23


def feature(caption: str) -> np.ndarray:
    """(tokens, E): of each letter its number, its place and the caption's length."""
    codes = [1, *caption.encode(), 2]
    return np.array([[code, place, len(caption)] for place, code in enumerate(codes)], np.float16)


class Fake:
    """Reads letters; `asked` is what it was asked to encode, `left` how many calls it lives."""

    length, width = S, E

    def __init__(self, fingerprint="abc", left=99):
        self.identity, self.asked, self.left = {"name": "fake", "fingerprint": fingerprint}, [], left

    def encode(self, captions):
        self.check(captions)
        if not self.left:
            raise RuntimeError("killed")
        self.left -= 1
        self.asked.append(list(captions))
        out = np.zeros((len(captions), S, E), np.float16)
        for row, caption in enumerate(captions):
            out[row, : len(caption) + 2] = feature(caption)
        return out, np.array([len(caption) + 2 for caption in captions], np.int32)

    def check(self, captions):
        for caption in captions:
            if len(caption) + 2 > S:
                raise UserError(f"the caption {caption!r} takes {len(caption) + 2} tokens")


def picture_folder(top, captions):
    for i, caption in enumerate(captions):
        file = top / f"{i:02d}.png"
        Image.fromarray(np.full((16, 16, 3), 9 * i, np.uint8)).save(file)
        file.with_suffix(".txt").write_text(caption)
    return top


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A cache of 23 pictures in shards of 5, with captions of other lengths, some of them twice in a shard or in two."""
    captions = [("a", "red dot", "b" * (i % 8 + 1), "a", f"number {i}")[i % 5] for i in range(PICTURES)]
    folder = picture_folder(tmp_path_factory.mktemp("pictures"), captions)
    out = tmp_path_factory.mktemp("latents")
    prepare_latents(folder, out, RandomAutoencoder(), 16, batch_size=4, shard_size=5)
    return out


@pytest.fixture
def cache(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "cache")


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """With features."""
    out = shutil.copytree(latents, tmp_path_factory.mktemp("whole") / "cache")
    prepare_features(out, Fake(), "fake")
    return out


def source(cache, seed=0, tokens=0, **fields):
    return load(ImageDataConfig(name="latents", path=str(cache), **fields), seed, tokens)


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


def test_what_is_written(cache):
    """Ragged: as many rows as the different captions of a shard have tokens; each is encoded once."""
    encoder = Fake()
    assert prepare_features(cache, encoder, "fake") == PICTURES
    assert encoder.asked[0] == [""] and all(len(set(asked)) == len(asked) == 4 for asked in encoder.asked[1:5])
    for shard in range(5):
        captions = json.loads((cache / f"captions_{shard:06d}.json").read_text())
        context, places = (np.load(cache / f"{kind}_{shard:06d}.npy") for kind in ("context", "places"))
        assert context.dtype == np.float16 and places.dtype == np.int32
        assert context.shape == (sum(len(caption) + 2 for caption in set(captions)), E)
        for caption, (first, count) in zip(captions, places, strict=True):
            assert (context[first : first + count] == feature(caption)).all()
    assert (np.load(cache / "null.npy") == feature("")).all()
    said = json.loads((cache / "text.json").read_text())
    assert said["text_encoder"] == encoder.identity and (said["length"], said["width"], said["path"]) == (S, E, "fake")


def test_many_captions_go_through_in_pieces(cache, monkeypatch):
    monkeypatch.setattr(features, "PIECE", 3)
    encoder = Fake()
    prepare_features(cache, encoder, "fake")
    assert {len(asked) for asked in encoder.asked} == {1, 3}
    of = source(cache)
    assert (of.batch("train", 0, 9)["context"] == Fake().encode(of.captions("train", 0, 9))[0]).all()


def test_a_batch_has_the_features_of_its_captions(whole):
    of = source(whole, seed=2)
    for split, n in (("train", 3), ("val", 0)):
        batch = of.batch(split, n, 16)
        context_BxSxE, length_B = Fake().encode(of.captions(split, n, 16))
        assert batch["context"].dtype == np.float16 and batch["length"].dtype == np.int32
        assert (batch["context"] == context_BxSxE).all() and (batch["length"] == length_B).all()
        for rows in (slice(3, 9), slice(1, None, 5)):
            part = source(whole, seed=2).batch(split, n, 16, rows)
            assert all((part[key] == batch[key][rows]).all() for key in batch)
    assert (of.null["context"] == Fake().encode([""])[0][0]).all() and of.null["length"] == 2
    assert {key: x.shape for key, x in of.null.items()} == {"context": (S, E), "length": ()}


def test_what_a_source_says_of_its_features(whole, latents):
    of = source(whole)
    assert of.identity["text_encoder"] == Fake().identity and of.identity["context_length"] == S
    assert "captions by the text encoder 'fake' (fingerprint abc)" in of.description
    bare = source(latents)
    assert "context" not in bare.batch("train", 0, 2) and not hasattr(bare, "null") and "text_encoder" not in bare.identity


def test_tokens_do_not_read_features(whole, monkeypatch):
    def none_is_read(*_):
        raise AssertionError("features were read")

    monkeypatch.setattr(features.Features, "of_picture", none_is_read)
    monkeypatch.setattr(features.Features, "__init__", none_is_read)
    of = source(whole, tokens=20)
    batch = of.batch("train", 0, 6)
    assert {"tokens", "length"} < set(batch) and "context" not in batch and "text_encoder" not in of.identity
    assert set(of.null) == set(of.encode_prompts(["a"])) == {"tokens", "length"}
    assert (batch["tokens"] == of.encode_prompts(of.captions("train", 0, 6))["tokens"]).all()


def test_killed_and_started_again(cache, whole):
    for calls, shards in ((0, 0), (1, 0), (3, 2), (1, 3), (0, 3)):  # the first call is the empty caption's
        with pytest.raises(RuntimeError, match="killed"):
            prepare_features(cache, Fake(left=calls), "fake")
        assert len(list(cache.glob("context_*.npy"))) == shards and not list(cache.glob("*.part"))
        if shards:
            with pytest.raises(UserError, match="not finished: run --mode=prepare with --text_encoder again, it goes on"):
                source(cache)
    prepare_features(cache, Fake(left=2), "fake")
    assert contents(cache) == contents(whole)
    before = {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")}
    prepare_features(cache, Fake(left=0), "fake")  # nothing to do
    assert before == {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")}


def test_killed_between_two_files(cache, whole, monkeypatch):
    for stop in (0, 2, 3, 5):
        with killed_after(stop, monkeypatch):
            prepare_features(cache, Fake(), "fake")
    prepare_features(cache, Fake(), "fake")
    assert contents(cache) == contents(whole)


@pytest.mark.parametrize("name", ["context_000002.npy", "places_000000.npy", "null.npy", "text.json"])
def test_damaged(cache, whole, name):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    (cache / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"text.json or a shard of it is damaged .*delete text.json, and run --mode=prepare"):
        source(cache)
    source(cache, tokens=20)  # has no use for them
    if name == "text.json":
        with pytest.raises(UserError, match=r"text.json is damaged: delete it, and prepare the features again"):
            prepare_features(cache, Fake(), "fake")
        (cache / name).unlink()
    prepare_features(cache, Fake(), "fake")
    assert contents(cache) == contents(whole)


def test_features_of_other_pictures(cache, whole):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    said = json.loads((cache / "text.json").read_text())
    said["shards"][0], said["shards"][4] = said["shards"][4], said["shards"][0]  # the last has three pictures
    (cache / "text.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="features of other pictures"):
        source(cache)


def test_another_encoder_is_refused(cache, whole):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    message = r"of the text encoder 'fake' \(fingerprint abc\) of 12 tokens, and .* 'fake' \(fingerprint xyz\) of 12"
    with pytest.raises(UserError, match=message + ": delete .*text.json to make them anew"):
        prepare_features(cache, Fake("xyz"), "fake")
    longer = Fake()
    longer.length = 20
    with pytest.raises(UserError, match=r"and you ask for .* of 20"):
        prepare_features(cache, longer, "fake", 20)
    assert contents(cache) == contents(whole)


def test_too_long_captions_are_said_before_anything_is_encoded(tmp_path):
    folder = picture_folder(tmp_path, ["a", "b", "c", "of too many letters"])
    out = tmp_path / "out"
    prepare_latents(folder, out, RandomAutoencoder(), 16, shard_size=2)
    encoder = Fake()
    with pytest.raises(UserError, match="'of too many letters' takes 21 tokens"):
        prepare_features(out, encoder, "fake")
    assert not encoder.asked and not (out / "null.npy").exists()


def test_nothing_to_encode(latents, tmp_path):
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    prepare_latents(tmp_path, tmp_path / "out", RandomAutoencoder(), 16)
    with pytest.raises(UserError, match="holds no captions to encode: prepare it from pictures with captions"):
        prepare_features(tmp_path / "out", Fake(), "fake")
    with pytest.raises(UserError, match=r"meta.json or a shard is damaged .*: prepare the latents again"):
        prepare_features(tmp_path, Fake(), "fake")


class Shelf:
    """Stands in for `load_text_encoder`: what lies at which path, and how often it was asked for."""

    def __init__(self, **at):
        self.at, self.loads = at, []

    def __call__(self, path, length=None):
        self.loads.append(path)
        if path not in self.at:
            raise UserError(f"there is no {path}")
        return self.at[path]


def test_prompts_are_encoded_once(cache, whole, monkeypatch):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    encoder = Fake()
    shelf = Shelf(fake=encoder)
    monkeypatch.setattr(features, "load_text_encoder", shelf)
    of = source(cache)
    first = of.encode_prompts(["new", "", "red dot", "new"])
    want_NxSxE, length_N = Fake().encode(["new", "", "red dot", "new"])
    assert (first["context"] == want_NxSxE).all() and (first["length"] == length_N).all()
    assert first["context"].dtype == np.float16 and first["length"].dtype == np.int32
    assert encoder.asked == [["new", "red dot"]] and shelf.loads == ["fake"]
    assert (source(cache).encode_prompts([""])["context"][0] == of.null["context"]).all()
    again = source(cache).encode_prompts(["red dot", "new"])
    assert (again["context"] == want_NxSxE[[2, 0]]).all() and shelf.loads == ["fake"]
    of.encode_prompts(["new", "third"])
    assert encoder.asked[1:] == [["third"]]
    with pytest.raises(UserError, match="takes 16 tokens"):
        of.encode_prompts(["of many letters"[:14]])
    next((cache / "prompts").iterdir()).write_bytes(b"damaged")
    assert (of.encode_prompts(["new", "", "red dot", "new"])["context"] == want_NxSxE).all()


def test_an_encoder_that_was_moved(cache, whole, monkeypatch):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    shelf = Shelf(elsewhere=Fake())
    monkeypatch.setattr(features, "load_text_encoder", shelf)
    with pytest.raises(UserError, match=r"the prompt 'new' is new, and .* is not where it was \(there is no fake\): run"):
        source(cache).encode_prompts(["new"])
    prepare_features(cache, Fake(left=0), "elsewhere")  # as the message says: nothing is encoded again
    assert source(cache).encode_prompts(["new"])["length"].tolist() == [5]
    shelf.at["elsewhere"] = Fake("xyz")
    assert source(cache).encode_prompts(["new"])["length"].tolist() == [5]  # kept
    with pytest.raises(UserError, match=r"elsewhere holds 'fake' \(fingerprint xyz\) now, and .* was made with 'fake'"):
        source(cache).encode_prompts(["newer"])


def test_prompts_that_cannot_be_kept(cache, whole, monkeypatch):
    shutil.copytree(whole, cache, dirs_exist_ok=True)
    monkeypatch.setattr(features, "load_text_encoder", Shelf(fake=Fake()))
    (cache / "prompts").write_text("a file in its place")
    with pytest.raises(UserError, match=r"could not keep prompts in .*prompts: "):
        source(cache).encode_prompts(["new"])


def test_made_anew_within_one_process(cache, whole):
    """Nothing remembers what lay in the folder before."""
    prepare_features(cache, Fake(), "fake")
    assert source(cache).identity["text_encoder"]["fingerprint"] == "abc"
    (cache / "text.json").unlink()
    assert "context" not in source(cache).batch("train", 0, 2)
    prepare_features(cache, Fake("xyz"), "fake")
    assert source(cache).identity["text_encoder"]["fingerprint"] == "xyz"


def test_a_small_text_encoder_from_end_to_end(tmp_path, monkeypatch):
    """Shapes, a cache of both passes, a batch and prompts: what the encoder says of the captions."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=quick.UNOPTIMISED))
    folder, out = text_folders.small(tmp_path / "encoder"), tmp_path / "out"
    prepare_latents("shapes", out, RandomAutoencoder(), 16, count=40, held_out_pairs=4, shard_size=30)
    prepare_features(out, load_text_encoder(folder), str(folder))
    of, encoder = source(out), load_text_encoder(folder)
    asked = [*of.captions("train", 1, 6), *of.unseen(4)[0], ""]
    context_NxSxE, length_N = encoder.encode(asked)
    batch, prompts = of.batch("train", 1, 6), of.encode_prompts(asked[6:])
    got = np.concatenate([batch["context"], prompts["context"]])
    assert got.shape == (11, encoder.length, encoder.width) and len(np.unique(length_N)) > 2
    np.testing.assert_allclose(got.astype(float), context_NxSxE.astype(float), atol=2e-3)  # batches of other sizes
    assert [*batch["length"], *prompts["length"]] == length_N.tolist()
    np.testing.assert_allclose(of.null["context"].astype(float), context_NxSxE[-1].astype(float), atol=2e-3)
    assert of.identity["text_encoder"] == encoder.identity
