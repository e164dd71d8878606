"""What is prepared: pictures of a folder with their captions, in the same order, and what is wrong with them in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxvram.data import pictures
from jaxvram.errors import UserError


def draw(file, grey=0, size=(20, 16)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(file)
    return file


def caption_all(folder, suffix=".txt"):
    """The caption of a/b.png is 'a/b of <folder>'."""
    for file in folder.rglob("*.png"):
        file.with_suffix(suffix).write_text(f"  {said_of(folder, file)}\n", encoding="utf-8")


def said_of(folder, file):
    return file.relative_to(folder).with_suffix("").as_posix() + " für dich"


def metadata(file, entries):
    file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture
def bare(tmp_path):
    for i in range(4):
        draw(tmp_path / f"{i}.png", grey=i)
    return tmp_path


@pytest.fixture
def classes(tmp_path):
    """Two splits of two classes; the grey of a picture is its place in the order of preparation."""
    names = [("train", "cold"), ("train", "cold"), ("train", "hot"), ("val", "cold"), ("val", "hot"), ("val", "hot")]
    for i, (split, name) in enumerate(names):
        draw(tmp_path / split / name / f"{i}.png", grey=i)
    return tmp_path


def shown(found):
    """(place, grey) of all."""
    places, crops = found.reader(0, 2).take(99)
    return places, [int(crop[0, 0, 0]) for crop in crops]


def test_a_caption_beside_each_picture(bare):
    caption_all(bare)
    (bare / "notes.txt").write_text("of no picture")
    found = pictures.find(str(bare), 16)
    assert found.captions == [f"{i} für dich" for i in range(4)] and shown(found) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert found.flips == 1 and found.first_val is None and found.class_names == () and len(found) == 4


def test_a_folder_without_captions(bare):
    found = pictures.find(str(bare), 16)
    assert found.captions is None and found.flips == 2
    (bare / "notes.txt").write_text("of no picture")
    assert pictures.find(str(bare), 16).stamp == found.stamp


@pytest.mark.parametrize("kind", ["beside", "one list", "a list a split"])
def test_splits_and_classes_with_captions(classes, kind):
    caption_all(classes)
    files = sorted(classes.rglob("*.png"), key=lambda file: file.name)
    said = [said_of(classes, file) for file in files]
    if kind != "beside":
        for file in classes.rglob("*.txt"):
            file.unlink()
        for root in [classes] if kind == "one list" else [classes / "train", classes / "val"]:
            here = [(file, text) for file, text in zip(files, said, strict=True) if root in file.parents]
            entries = [{"file_name": file.relative_to(root).as_posix(), "text": text, "more": 1} for file, text in here]
            metadata(root / "metadata.jsonl", entries[::-1])
    found = pictures.find(str(classes), 16)
    assert found.captions == said and shown(found)[1] == [*range(6)]
    assert found.labels_N.tolist() == [0, 0, 1, 0, 1, 1] and found.class_names == ("cold", "hot") and found.first_val == 3


def test_what_is_left_out_takes_its_caption_along(bare):
    """Too small, unreadable, and damaged behind its header: the others keep theirs."""
    draw(bare / "0a.png", size=(4, 4))
    (bare / "1a.png").write_bytes(b"")
    raw = draw(bare / "1b.png", size=(200, 160)).read_bytes()
    (bare / "1b.png").write_bytes(raw[: len(raw) // 2])
    caption_all(bare)
    (bare / "1a.txt").unlink()  # it needs none
    found = pictures.find(str(bare), 16)
    places, greys = shown(found)
    assert [found.captions[place] for place in places] == [f"{grey} für dich" for grey in greys] and greys == [0, 1, 2, 3]
    assert [fault.split(":")[0] for fault in found.skipped] == ["0a.png", "1a.png"]


def test_bare_pictures_among_folders_of_classes(classes):
    draw(classes / "lost.png")
    for file in (classes / "val").rglob("*.png"):
        file.unlink()
    (classes / "train").rename(classes / "other")
    caption_all(classes)
    (classes / "lost.txt").unlink()
    found = pictures.find(str(classes), 16)
    assert found.captions == [f"other/{name} für dich" for name in ("cold/0", "cold/1", "hot/2")]
    assert found.skipped == ("lost.png: lies in no folder of a class",) and found.class_names == ("other",)


def test_captions_and_pictures_are_in_the_stamp(bare):
    caption_all(bare)
    stamp = pictures.find(str(bare), 16).stamp
    assert pictures.find(str(bare), 16).stamp == stamp
    (bare / "2.txt").write_text("another")
    changed = pictures.find(str(bare), 16).stamp
    draw(bare / "4.png")
    (bare / "4.txt").write_text("one more")
    assert len({stamp, changed, pictures.find(str(bare), 16).stamp}) == 3


def unlink(*numbers):
    return lambda at: [(at / f"{i}.txt").unlink() for i in numbers]


def lists(*entries):
    return lambda at: metadata(at / "metadata.jsonl", entries)


def writes(name, content):
    return lambda at: (at / name).write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (unlink(1), r"1 of 4 pictures in .* have no caption \(1.png\): write a .txt of the same name beside each"),
        (unlink(0, 1, 3), r"3 of 4 .* have no caption \(0.png, 1.png, 3.png\)"),
        (lambda at: [(at / f"{i}.txt").write_text(" \n") for i in range(4)],
         r"4 of 4 .* have an empty caption \(0.png, 1.png, 2.png, \.\.\.\): write a .txt"),
        (writes("2.txt", b"caf\xe9 au lait"), r"2.txt is not UTF-8: .* at byte 3"),
        (lists({"file_name": "0.png", "text": "a"}, {"file_name": "2.png", "text": ""}),
         r"2 of 4 .* have no caption \(1.png, 3.png\): write a line in metadata.jsonl"),
        (writes("metadata.jsonl", b'\n{"file_name": "0.png", '), r"metadata.jsonl, line 2 is no \{.*JSON"),
        (lists({"file": "0.png", "text": "a"}), r"line 1 is no .*KeyError\('file_name'"),
        (lists(["0.png", "a"]), r"metadata.jsonl, line 1 is no "),
        (lists({"file_name": "0.png", "text": None}), r"line 1 is no .*text is no string"),
        (writes("metadata.jsonl", b'{"file_name": "\xff"}'), r"metadata.jsonl is not UTF-8"),
    ],
)  # fmt: skip
def test_captions_that_will_not_do(bare, break_it, message):
    caption_all(bare)
    break_it(bare)
    with pytest.raises(UserError, match=message) as raised:
        pictures.find(str(bare), 16)
    assert "\n" not in str(raised.value)


def test_texts_as_other_programs_write_them(bare):
    """A mark at the front, as Windows puts it; other ends of lines, in JSON and in a caption."""
    caption_all(bare)
    (bare / "0.txt").write_bytes("\ufeffzero".encode())
    assert pictures.find(str(bare), 16).captions[0] == "zero"
    metadata(bare / "metadata.jsonl", [{"file_name": f"{i}.png", "text": f"{i}\u2028or\x85so"} for i in range(4)])
    raw = (bare / "metadata.jsonl").read_bytes()
    (bare / "metadata.jsonl").write_bytes(raw.replace(b"\n", b"\r\n"))
    assert pictures.find(str(bare), 16).captions == [f"{i}\u2028or\x85so" for i in range(4)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("shapes", {"count": 9}, "--count=9 is too few: take 10 or more"),
        ("shapes", {"count": -20}, "--count=-20 is too few"),
        ("shapes", {"count": 20, "aspects": 2}, "--aspects is for folders of pictures"),
        ("emoji", {"count": 20}, "--count is for --input=shapes"),
        ("shapes", {"font": "a.ttf"}, "--font is for --input=emoji"),
        ("shapes", {"count": 20, "held_out_pairs": 9}, "held_out_pairs=9 is not in 0 to 8"),
        ("emoji", {"held_out_pairs": 2}, "--held_out_pairs and --held_out_captions are for --input=shapes"),
        (".", {"held_out_captions": 2}, "--held_out_pairs and --held_out_captions are for --input=shapes"),
        (".", {"count": 20}, "--count is for --input=shapes"),
    ],
)
def test_options_that_mean_nothing(source, options, message):
    with pytest.raises(UserError, match=message):
        pictures.find(source, 16, **options)


def test_shapes_of_both_splits_in_one_row():
    found = pictures.find("shapes", 16, count=40, held_out_pairs=4)
    assert len(found) == 40 and found.first_val == 36 and found.flips == 1
    for place, label, caption in zip(range(40), found.labels_N, found.captions, strict=True):
        assert found.class_names[label] in caption, place
    whole = found.reader(0, 8).take(40)[1]
    part = found.reader(30, 8)
    places, crops = part.take(8)  # over the border of the splits
    assert places == [*range(30, 38)] and part.next == 38 and (np.stack(crops) == np.stack(whole[30:38])).all()
    assert len(part.take(8)[0]) == 2 and part.take(8) == ([], [])
    assert found.stamp != pictures.find("shapes", 16, count=40).stamp != pictures.find("shapes", 16, count=50).stamp
