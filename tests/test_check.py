"""Checking records: every kind of problem is found where it is and nowhere else, and what is safe is put right."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from xvlm.data import check
from xvlm.data.problems import KINDS, Item, Problem, decoded_again, problems_of, put_right
from xvlm.data.readers import coco_json, csv_table
from xvlm.data.records import Record, unchecked
from xvlm.data.shards import Index, Shard, Shards
from xvlm.data.writing import write_shards

WIDTH, HEIGHT = 120, 80
BOX = [10.0, 10.0, 50.0, 60.0]


def photograph(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTOGRAPH = encoded(photograph())


def document(**more) -> dict:
    sound = {"id": "r", "source": "made", "width": WIDTH, "height": HEIGHT, "captions": ["Zwei Mädchen: 2 girls"]}
    sound["regions"] = [{"box_xyxy": BOX, "descriptions": ["a girl", "She's left"], "attributes": ["young"]}]
    sound["objects"] = [{"box_xyxy": BOX, "label": "girl"}, {"box_xyxy": [0.0, 0.0, 120.0, 80.0], "label": "grass"}]
    sound["phrases"] = [{"caption": 0, "start": 5, "end": 12, "boxes_xyxy": [BOX]}]
    sound["expressions"] = [{"text": "the left one", "box_xyxy": BOX}, {"text": "a dog"}]
    sound["questions"] = [{"text": "how many?", "answers": {"2": 1.0}}]
    return sound | more


def found(record: dict, image: bytes = PHOTOGRAPH, max_words: int = 40) -> list[tuple[str, str]]:
    """Kinds and places of all problems."""
    problems, _ = problems_of(Item("f", "r", record, image), max_words)
    assert all(problem.kind in KINDS for problem in problems)
    return [(problem.kind, ".".join(map(str, problem.place))) for problem in problems]


def fixed(record: dict, image: bytes = PHOTOGRAPH) -> tuple[Record, bytes]:
    item = Item("f", "r", record, image)
    return put_right(item, problems_of(item, 40)[0])


def test_a_sound_record_has_no_problems():
    assert found(document()) == []
    assert fixed(document()) == (Record.model_validate(document()), PHOTOGRAPH)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


@pytest.mark.parametrize(
    ("box", "kind", "better"),
    [
        ([50, 10, 50, 60], "box-degenerate", None),
        ([110, 70, 5, 70], "box-degenerate", None),
        ([10, 10, 121, 60], "box-outside", [10, 10, 120, 60]),
        ([-2, 10, 50, 60], "box-outside", [0, 10, 50, 60]),
        ([10, 10, 150, 60], "box-outside", None),
        ([130, 10, 150, 60], "box-outside", None),
        ([60, 40, 50, 30], "box-looks-xywh", BOX),
        ([70, 40, 160, 100], "box-looks-xyxy", BOX),
        ([0.1, 0.2, 0.5, 1], "box-looks-relative", BOX),
        ([10, 10, 50], "box-malformed", None),
        ([10, 10, float("nan"), 60], "box-malformed", None),
        (["a", 10, 50, 60], "box-malformed", None),
        ("10 10 50 60", "box-malformed", None),
    ],
)
def test_boxes(box, kind, better):
    record = document()
    record["objects"][0]["box_xyxy"] = box
    assert found(record) == [(kind, "objects.0.box_xyxy")]
    if kind.startswith("box-looks"):  # not safe to guess
        if kind != "box-looks-relative":
            with pytest.raises(ValueError, match=r"objects\.0"):
                fixed(record)
        return
    objects = fixed(record)[0].objects
    if better is None:
        assert [thing.label for thing in objects] == ["grass"]
    else:
        assert list(objects[0].box_xyxy) == better


@pytest.mark.parametrize("place", ["regions.0.box_xyxy", "expressions.0.box_xyxy", "phrases.0.boxes_xyxy.0"])
def test_boxes_of_every_kind(place):
    record = document()
    kind, number, name, *more = place.split(".")
    parent = record[kind][int(number)]
    parent[name] = [[50, 10, 50, 60]] if more else [50, 10, 50, 60]
    assert found(record) == [("box-degenerate", place)]
    right, _ = fixed(record)
    if kind == "phrases":
        assert right.phrases[0].boxes_xyxy == []
    else:
        assert len(getattr(right, kind)) == len(record[kind]) - 1


def test_several_problems_of_one_record_are_all_found():
    record = document(captions=["", "a 12"], phrases=[], objects=[{"box_xyxy": [9, 9, 9, 12], "label": "n01440764"}])
    assert set(found(record, b"")) == {
        ("image-empty", "image"),
        ("text-empty", "captions.0"),
        ("box-degenerate", "objects.0.box_xyxy"),
        ("text-is-id", "objects.0.label"),
    }


def test_masks_and_spans():
    record = document()
    record["objects"][0]["mask"] = {"size": [WIDTH, HEIGHT], "counts": "x"}
    record["objects"][1]["mask"] = {"size": [HEIGHT, WIDTH], "counts": "x"}
    record["phrases"] += [{"caption": 0, "start": 5, "end": 99}, {"caption": 1, "start": 0, "end": 2}]
    assert found(record) == [
        ("mask-size", "objects.0.mask.size"),
        ("mask-size", "objects.1.mask.counts"),
        ("span-outside", "phrases.1"),
        ("span-outside", "phrases.2"),
    ]
    assert len(fixed(record)[0].phrases) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "text-empty"),
        ("  ...", "text-empty"),
        ("a CafÃ©", "text-encoding"),
        ("it\u00e2\u20ac\u2122s", "text-encoding"),
        ("black &amp; white", "text-encoding"),
        ("a caf\ufffd", "text-encoding"),
        ("tab\x00le", "text-encoding"),
        ("word " * 41, "text-long"),
        ("n01440764", "text-is-id"),
        ("/m/01g317", "text-is-id"),
        ("123456", "text-is-id"),
        ("DSC_0001.jpg", "text-is-id"),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "text-is-id"),
        ("category_12", "text-is-id"),
        ("None", "text-is-id"),
        ("Q12345", "text-is-id"),
        ("n02084071 dog", "text-is-id"),
        ("/m/0bt9lr dog", "text-is-id"),
        ("a" * 801, "text-long"),
        ("狗" * 41, "text-long"),
    ],
)
def test_texts_that_are_wrong(text, kind):
    record = document(captions=["fine", text], phrases=[])
    assert found(record) == [(kind, "captions.1")]
    record = document(objects=[{"box_xyxy": BOX, "label": text}])
    assert found(record) == [(kind, "objects.0.label")]


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "İstanbul’da",
        "狗" * 40,
        "the 2nd of 12",
        "12",
        "Q1",
        "R&B singer",
        "a 1980s car",
        "facade",
        "“so”",
        "öä",
    ],
)
def test_texts_that_are_right(text):
    assert found(document(captions=[text], phrases=[])) == []


OPEN = b"\x81\x8d\x8f\x90\x9d"  # bytes that are no character in Windows-1252


@settings(deadline=None)
@given(st.text(min_size=1))
def test_what_was_decoded_wrongly_is_decoded_again(text):
    assume(decoded_again(text) == text)
    wrongly = "".join(bytes([byte]).decode("cp1252" if byte not in OPEN else "latin-1") for byte in text.encode())
    assert decoded_again(wrongly) == text


def test_a_number_is_a_word_on_a_shirt_but_no_label():
    assert found(document(regions=[{"box_xyxy": BOX, "descriptions": ["12"]}])) == []
    assert found(document(objects=[{"box_xyxy": BOX, "label": "12"}])) == [("text-is-id", "objects.0.label")]


@pytest.mark.parametrize(
    ("answers", "kinds"),
    [
        ({"yes": 1.0, "2": 0.3, "none": 0.3, "12345": 1.0}, []),
        ({"": 1.0, "yes": 0.3}, ["text-empty"]),
        ({"cafÃ©": 1.0}, ["text-encoding"]),
        ({"yes " * 41: 1.0}, ["text-long"]),
        ({"x": -3.0}, ["answer-weight"]),
        ({"x": 0.0}, ["answer-weight"]),
        ({"x": float("nan")}, ["answer-weight"]),
        ({"x": float("inf")}, ["answer-weight"]),
        ({"x": "often"}, ["record"]),
    ],
)
def test_answers(answers, kinds):
    record = document(questions=[{"text": "what?", "answers": answers}])
    assert found(record) == [(kind, f"questions.0.answers.{next(iter(answers))}") for kind in kinds]
    if kinds != ["record"]:
        assert fixed(record)[0].questions == Record.model_validate(record).questions


def test_texts_are_put_right_with_what_hangs_on_them():
    record = document(
        captions=["", "a CafÃ© &amp; bar", "two girls"],
        regions=[{"box_xyxy": BOX, "descriptions": ["..."]}, {"box_xyxy": BOX, "descriptions": ["", "a bar"]}],
        phrases=[{"caption": 2, "start": 4, "end": 9, "boxes_xyxy": [BOX]}],
    )
    right, _ = fixed(record)
    assert right.captions == ["a CafÃ© &amp; bar", "two girls"]  # characters would move under the spans
    assert [(phrase.caption, phrase.start) for phrase in right.phrases] == [(1, 4)]
    assert [region.descriptions for region in right.regions] == [["a bar"]]
    assert fixed(record | {"phrases": []})[0].captions == ["a Café & bar", "two girls"]


# ---------------------------------------------------------------------------------------------------------------------
# Images


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


GREY_16 = Image.fromarray(np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16))
FRAMES = {"save_all": True, "append_images": [photograph(1)]}


@pytest.mark.parametrize(
    ("image", "kinds"),
    [
        (b"", ["image-empty"]),
        (png(0, 80, 8, b""), ["image-empty"]),
        (b"<html>not found</html>", ["image-unreadable"]),
        (PHOTOGRAPH[: len(PHOTOGRAPH) // 2], ["image-unreadable"]),
        (encoded(photograph(), "PNG")[:-200], ["image-unreadable"]),
        (png(20000, 20000, 8, b""), ["image-unreadable"]),
        (encoded(photograph(size=(60, 40))), ["image-size"]),
        (encoded(photograph().convert("CMYK")), ["image-mode"]),
        (encoded(photograph().convert("P"), "PNG"), ["image-mode"]),
        (encoded(photograph().convert("RGBA"), "PNG"), ["image-mode"]),
        (encoded(GREY_16, "PNG"), ["image-mode"]),
        (png(WIDTH, HEIGHT, 16, (b"\0" + b"\x80\0" * 3 * WIDTH) * HEIGHT), ["image-mode"]),
        (encoded(photograph(), "WEBP", **FRAMES), ["image-animated"]),
        (encoded(photograph(), "GIF", **FRAMES), ["image-format", "image-animated", "image-mode"]),
        (encoded(photograph(), "BMP"), ["image-format"]),
        (encoded(photograph().convert("L")), []),
        (encoded(photograph(), "WEBP"), []),
    ],
)
def test_images(image, kinds):
    assert found(document(), image) == [(kind, "image") for kind in kinds]
    if set(kinds) & {"image-mode", "image-animated", "image-format"}:
        right, data = fixed(document(), image)
        assert found(right.model_dump(mode="json", exclude_defaults=True), data) == []


def test_16_bits_are_scaled_and_transparency_lies_on_white():
    _, data = fixed(document(), encoded(GREY_16, "PNG"))
    grey = np.asarray(Image.open(io.BytesIO(data)))[..., 0].ravel()
    assert (grey[0], grey[-1]) == (0, 255)
    assert grey[len(grey) // 2] == pytest.approx(127, abs=1)
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0))
    _, data = fixed(document(), encoded(clear, "PNG"))
    assert Image.open(io.BytesIO(data)).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_an_image_whose_white_nobody_knows_is_left_out(tmp_path, dtype):
    wide = encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 200, dtype)), "TIFF")
    samples = [(Record.model_validate(document(id="wide")), wide), made(0)]
    assert check.check(check.read(samples, "f"), fix=tmp_path / "fixed").problems == []
    assert len(Shards(tmp_path / "fixed")) == 1
    (change,) = changes(tmp_path / "fixed")
    assert (change["record"], change["fix"]) == ("wide", "leave out")


def turned(orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(size=size), exif=exif)


def test_rotation_is_put_right_only_where_no_box_can_be_wrong():
    assert found(document(), turned(1)) == []
    assert found(document(), turned(6)) == [("image-rotated", "image")]
    assert fixed(document(), turned(6)) == (Record.model_validate(document()), turned(6))  # whose pixels, nobody knows
    captions_only = {"id": "r", "source": "made", "width": WIDTH, "height": HEIGHT, "captions": ["a girl"]}
    of_the_turned = document(width=HEIGHT, height=WIDTH, objects=[{"box_xyxy": [0, 0, 80, 120], "label": "all"}])
    for record in (captions_only, of_the_turned):
        assert found(record, turned(6)) == [("image-rotated", "image")]
        right, data = fixed(record, turned(6))
        image = Image.open(io.BytesIO(data))
        assert (right.width, right.height) == image.size == (HEIGHT, WIDTH)
        expected = Image.open(io.BytesIO(turned(6))).transpose(Image.Transpose.ROTATE_270)
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 5


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_of_turned_pictures_are_put_right_where_one_says_that_they_are(orientation):
    image = turned(orientation)
    width, height = (WIDTH, HEIGHT) if orientation == 3 else (HEIGHT, WIDTH)
    record = document(objects=[{"box_xyxy": [0, 0, width, height], "label": "all"}])
    item = Item("f", "r", record, image)
    problems, _ = problems_of(item, 40, boxes_turned=True)
    assert [(problem.kind, problem.fix) for problem in problems] == [("image-rotated", "turn")]
    right, data = put_right(item, problems)
    assert (right.width, right.height) == Image.open(io.BytesIO(data)).size == (width, height)
    assert right.objects[0].box_xyxy == (0, 0, width, height)


def test_boxes_of_the_stored_pixels_are_told_where_one_says_that_they_are_turned():
    record = document(objects=[{"box_xyxy": [60, 10, 118, 60], "label": "girl"}])
    problems, _ = problems_of(Item("f", "r", record, turned(6)), 40, boxes_turned=True)
    [(kind, fix, message)] = [(each.kind, each.fix, each.message) for each in problems if each.place[0] == "objects"]
    assert (kind, fix) == ("box-outside", None)
    assert "in the stored 120x80 pixels; perhaps --boxes-turned is wrong here" in message
    (problem,) = problems_of(Item("f", "r", record, turned(6)), 40)[0]
    assert "xvlm data show draws" in problem.message and "--boxes-turned --fix FOLDER" in problem.message


def test_fixing_what_has_no_record_says_what_the_first_problem_is(tmp_path):
    (tmp_path / "train.csv").write_text("image,text\na.jpg,x\n")
    (tmp_path / "b.csv").write_text("image,text\nb.jpg,x\n")
    (tmp_path / "b.jpg").write_bytes(b"none")
    for file, reason in (("train.csv", r"a\.jpg: no such photograph"), ("b.csv", r"image cannot be decoded")):
        items = check.read(csv_table.read(tmp_path, "train", files=[tmp_path / file]), str(tmp_path))
        with pytest.raises(ValueError, match=rf"fixed: there is no record to pack: .*{reason}"):
            check.check(items, fix=tmp_path / "fixed")


def test_the_size_of_a_square_says_nothing_about_its_boxes():
    square = turned(6, (WIDTH, WIDTH))
    problems, _ = problems_of(Item("f", "r", document(height=WIDTH), square), 40)
    assert [(problem.kind, problem.fix) for problem in problems] == [("image-rotated", None)]


# ---------------------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"widht": 3}, "widht"),
        ({"split": "dev"}, "split"),
        ({"width": "wide"}, "width"),
        ({"captions": "one"}, "captions"),
        ({"captions": [3], "phrases": []}, "captions.0"),
        ({"objects": [{"label": "dog"}]}, "objects.0.box_xyxy"),
        ({"id": "other"}, "id"),
    ],
)
def test_fields_of_the_wrong_type(change, place):
    assert ("record", place) in found(document(**change))


def test_an_id_that_cannot_be_packed():
    problems, _ = problems_of(Item("f", "a.b", document(id="a.b"), PHOTOGRAPH), 40)
    assert [problem.place for problem in problems] == [("id",)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["box_xyxy", "boxes_xyxy", "label", "caption", "start", "mask", "size"]), inner
        )
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from([*Record.model_fields, "unknown"])


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(FIELDS, JSON), st.booleans(), st.binary(max_size=40))
def test_whatever_a_document_is_problems_are_listed_and_nothing_is_raised(values, sound, image):
    record = document(**values) if sound else values
    item = Item("f", "r", record, image if image else PHOTOGRAPH)
    problems, picture = problems_of(item, 40)
    assert all(str(problem).startswith("f: r: ") for problem in problems)
    try:
        Record.model_validate(record)
    except ValueError:
        assert problems
    else:
        assert all(problem.kind != "record" or problem.place == ("id",) for problem in problems)
    assert (picture is None) == any(problem.kind in ("image-empty", "image-unreadable") for problem in problems)


# ---------------------------------------------------------------------------------------------------------------------
# Folders and sources


def pack_raw(folder: Path, samples: list[tuple[str, bytes]]) -> Path:
    """A packed folder of anything, with its index: key and the text of the record; all have the same image."""
    rows, data = [], b""
    for key, text in samples:
        rows.append((key, len(data), len(PHOTOGRAPH), len(data) + len(PHOTOGRAPH), len(text)))
        data += PHOTOGRAPH + text
    folder.mkdir()
    (folder / "000000.tar").write_bytes(data)
    index = Index(counts={}, shards=[Shard(file="000000.tar", size=len(data), samples=rows)])
    (folder / "index.json").write_text(index.model_dump_json())
    return folder


def raw(key: str, **more) -> tuple[str, bytes]:
    return key, json.dumps(document(id=key) | more).encode()


def told(report: check.Report) -> list[tuple[str, str]]:
    return [(problem.record, problem.kind) for problem in report.problems]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_checked_to_its_end(tmp_path, workers):
    samples = [raw("a"), ("b", b"{no json"), ("c", b"[1]"), raw("d", captions=[""], phrases=[]), raw("a"), raw("e")]
    folder = pack_raw(tmp_path / "s", samples)
    report = check.check(check.packed(folder), workers=workers)
    assert told(report) == [("b", "record"), ("c", "record"), ("d", "text-empty"), ("a", "duplicate-id")]
    assert report.records == 4
    assert str(report.problems[2]) == f"{folder}/000000.tar: d: captions.0: expected words (found '') [text-empty]"
    assert report.summary() == [
        f"{kind}: {n} ({KINDS[kind]})" for kind, n in (("record", 2), ("text-empty", 1), ("duplicate-id", 1))
    ]


@pytest.mark.parametrize("depth", [300, 950, 100_000])
def test_a_record_nested_without_end_is_one_problem(tmp_path, depth):
    folder = pack_raw(tmp_path / "s", [("a", b'{"id": "a", "tags": ' + b"[" * depth + b"]" * depth + b"}"), raw("b")])
    report = check.check(check.packed(folder))
    assert {name for name, _ in told(report)} == {"a"}


def test_kinds_that_are_accepted_are_not_told(tmp_path):
    samples = [raw("a"), ("b", b"{no json"), raw("d", captions=[""], phrases=[]), raw("a")]
    report = check.check(check.packed(pack_raw(tmp_path / "s", samples)), ignore=["record", "duplicate-id"])
    assert told(report) == [("d", "text-empty")]


def made(i: int, **more) -> tuple[Record, bytes]:
    with unchecked():
        return Record.model_validate(document(id=f"r{i}", **more)), encoded(photograph(i))


def changes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / check.CHANGES).read_text().splitlines()]


def test_damaged_shards_are_told_and_the_rest_is_checked(tmp_path):
    write_shards([made(i) for i in range(6)], tmp_path, samples_per_shard=2, progress=False)
    assert check.check(check.packed(tmp_path)).problems == []
    (tmp_path / "000000.tar").unlink()
    with (tmp_path / "000002.tar").open("r+b") as file:
        file.truncate(4000)
    report = check.check(check.packed(tmp_path))
    assert {(Path(problem.where).name, problem.kind) for problem in report.problems} == {
        ("000000.tar", "shard"),
        ("000002.tar", "shard"),
    }
    assert report.records >= 2


def test_a_source_is_checked_although_its_boxes_are_no_boxes():
    def reader():
        yield made(0)
        for i, box in enumerate(([9, 9, 9, 20], [10, 10, 500, 60]), 1):
            yield Record.model_validate(document(id=f"r{i}", objects=[{"box_xyxy": box, "label": "dog"}])), PHOTOGRAPH
        raise ValueError("annotations.json: annotation 7: no such image")

    assert told(check.check(check.read(reader(), "folder"))) == [
        ("r1", "box-degenerate"),
        ("r2", "box-outside"),
        ("", "reader"),
    ]
    with pytest.raises(ValueError, match="not a box inside"):
        Record.model_validate(document(objects=[{"box_xyxy": [9, 9, 9, 20], "label": "dog"}]))


def test_every_bad_box_of_a_table_is_told_though_its_reader_would_stop_at_the_first(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTOGRAPH)
    boxes = ["10,10,50,60", "10,10,10,60", "60,40,50,30", "10,10,900,60", "0.1,0.1,0.5,0.5"]
    lines = ["image,left,top,right,bottom,text", *(f"a.jpg,{box},a girl" for box in boxes)]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 3"):
        list(csv_table.read(tmp_path, "train"))
    report = check.check(check.read(csv_table.read(tmp_path, "train"), str(tmp_path)))
    assert [(".".join(map(str, problem.place)), problem.kind) for problem in report.problems] == [
        ("regions.1.box_xyxy", "box-degenerate"),
        ("regions.2.box_xyxy", "box-looks-xywh"),
        ("regions.3.box_xyxy", "box-outside"),
        ("regions.4.box_xyxy", "box-looks-relative"),
    ]
    assert [problem.where for problem in report.problems] == [f"{tmp_path}/train.csv line {i}" for i in (3, 4, 5, 6)]


def test_a_problem_of_a_source_is_told_with_its_place_in_the_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTOGRAPH)
    annotation = {"image_id": 1, "category_id": 1}
    said = [{"image_id": 1, "caption": "."}, annotation | {"bbox": [9, 9, 5, 5]}, annotation | {"bbox": [9, 9, 0, 5]}]
    file = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "a"}], "annotations": said}
    (tmp_path / "train.json").write_text(json.dumps(file))
    report = check.check(check.read(coco_json.read(tmp_path, "train"), str(tmp_path)))
    assert {problem.kind: problem.where for problem in report.problems} == {
        "text-empty": f"{tmp_path}/train.json: image 1",
        "box-degenerate": f"{tmp_path}/train.json: annotations.2",
    }


def test_a_check_goes_on_behind_what_a_reader_cannot_read(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(PHOTOGRAPH)
    (tmp_path / "broken.jpg").write_bytes(PHOTOGRAPH[:9])
    rows = [
        "broken.jpg,1,2,30,40,a dog",
        "a.jpg,1,2,x,4,a dog",
        "absent.jpg,1,2,3,4,a dog",
        ",1,2,3,4,a dog",
        "a.jpg,1",
    ]
    (tmp_path / "train.csv").write_text("\n".join(["image,left,top,right,bottom,text", *rows, "b.jpg,1,2,3,4,a dog"]))
    report = check.check(check.read(csv_table.read(tmp_path, "train"), str(tmp_path)))
    assert report.records == 2  # of a.jpg no row can be read, but it is there
    assert [problem.kind for problem in report.problems] == ["reader"] * 2 + ["image-unreadable"] + ["reader"] * 2
    reasons = (
        "line 5: image is empty",
        "line 6: expected 6 cells",
        "broken.jpg: image cannot",
        "line 3: left,",
        "absent.jpg: no",
    )
    assert all(reason in problem.message for reason, problem in zip(reasons, report.problems, strict=True))
    assert not any("what follows" in problem.message for problem in report.problems)
    with pytest.raises(ValueError, match="line 5: image is empty"):
        list(csv_table.read(tmp_path, "train"))


def test_images_of_a_source_that_cannot_be_opened_are_left_out_when_it_is_fixed(tmp_path):
    images = {
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "nothing.png": png(0, 80, 8, b""),
        "bomb.png": png(20000, 20000, 8, b""),
        "sound.jpg": PHOTOGRAPH,
    }
    for name, image in images.items():
        (tmp_path / name).write_bytes(image)
    (tmp_path / "train.csv").write_text("\n".join(["image,caption", *(f"{name},a girl" for name in images)]))
    source = [csv_table.read(tmp_path, "train") for _ in range(2)]
    report = check.check(check.read(source[0], str(tmp_path)))
    kinds = ["image-empty", "image-unreadable", "image-empty", "image-unreadable"]
    assert [problem.kind for problem in report.problems] == kinds
    assert "bomb.png: image cannot be decoded: it has more than 100,000,000 pixels (" in report.problems[3].message
    report = check.check(check.read(source[1], str(tmp_path)), fix=tmp_path / "fixed")
    assert report.problems == []
    assert [change["fix"] for change in changes(tmp_path / "fixed")] == ["leave out"] * 4
    assert "page.jpg" in changes(tmp_path / "fixed")[1]["because"][0]
    assert Shards(tmp_path / "fixed").read(0)[0].id == "sound"


def test_a_photograph_that_its_file_describes_as_turned_is_turned(tmp_path):
    (tmp_path / "a.jpg").write_bytes(turned(6))
    image = {"id": 1, "file_name": "a.jpg", "width": HEIGHT, "height": WIDTH}
    annotation = {"image_id": 1, "bbox": [10, 90, 60, 30], "caption": "her feet"}
    (tmp_path / "train.json").write_text(json.dumps({"images": [image], "annotations": [annotation]}))
    with pytest.raises(ValueError, match="the image is 120x80, its boxes are in pixels of 80x120"):
        list(coco_json.read(tmp_path, "train"))
    samples = coco_json.read(tmp_path, "train")
    assert check.check(check.read(samples, str(tmp_path)), fix=tmp_path / "fixed").problems == []
    record, _ = Shards(tmp_path / "fixed").read(0)
    assert ((record.width, record.height), record.regions[0].box_xyxy) == ((HEIGHT, WIDTH), (10, 90, 70, 120))


def test_a_file_that_cannot_be_read_at_all_ends_the_source(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (problem,) = check.check(check.read(coco_json.read(tmp_path, "train"), str(tmp_path))).problems
    assert problem.kind == "reader"
    assert "train.json: Input should be an object (found []); what follows was not looked at" in problem.message


def test_boxes_that_a_reader_cut_off_at_the_border_are_noticed():
    cut = [{"box_xyxy": [4.0 * i, 3.0 * i, 120.0, 80.0], "label": "dog"} for i in range(1, 15)]
    plain = [{"box_xyxy": BOX, "label": "dog"}] * 9
    (problem,) = check.check(check.read([made(0, objects=cut + plain)], "folder")).problems
    assert problem.kind == "box-looks-xyxy"
    assert "14 of 26" in problem.message
    assert check.check(check.read([made(0, objects=cut + 2 * plain)], "folder")).problems == []


def test_near_duplicates_are_told_when_asked_for():
    again = encoded(photograph(1).resize((60, 40)).resize((120, 80)), quality=60)
    samples = [made(0), made(1), made(2), (made(3)[0], again)]
    assert check.check(check.read(samples, "f")).problems == []
    (problem,) = check.check(check.read(samples, "f"), near_duplicates=True).problems
    assert (problem.record, problem.kind) == ("r3", "near-duplicate")
    assert "looks like record r1" in problem.message


def test_fixing_writes_a_new_folder_and_says_what_it_changed(tmp_path):
    to_fix = [{"box_xyxy": [10, 10, 121, 60], "label": "CafÃ©"}, {"box_xyxy": [9, 9, 9, 9], "label": "x"}]
    samples = [
        made(0),
        made(1, objects=to_fix),
        made(0),
        (made(2)[0], b"GIF89a"),
        made(3, objects=[{"box_xyxy": [60, 40, 50, 30], "label": "dog"}]),
        made(4, objects=[{"box_xyxy": BOX, "label": "n01440764"}]),
    ]
    report = check.check(check.read(samples, "f"), fix=tmp_path / "fixed")
    assert told(report) == [("r3", "box-looks-xywh"), ("r4", "text-is-id")]
    fixed = Shards(tmp_path / "fixed")
    records = [fixed.read(i)[0] for i in range(len(fixed))]
    assert [record.id for record in records] == ["r0", "r1", "r4"]
    assert [(thing.label, thing.box_xyxy) for thing in records[1].objects] == [("Café", (10, 10, 120, 60))]
    lines = changes(tmp_path / "fixed")
    assert [(line["record"], line["fix"]) for line in lines] == [
        ("r1", "put"),
        ("r1", "put"),
        ("r1", "drop"),
        ("r0", "leave out"),
        ("r2", "leave out"),
        ("r3", "leave out"),
    ]
    assert lines[1] == {
        "record": "r1",
        "fix": "put",
        "kind": "text-encoding",
        "place": "objects.0.label",
        "found": "CafÃ©",
        "better": "Café",
    }
    again = check.check(check.packed(tmp_path / "fixed"))
    assert told(again) == [("r4", "text-is-id")]
    with pytest.raises(FileExistsError):
        check.check(check.read(samples, "f"), fix=tmp_path / "fixed")


def test_statements_about_an_image_that_is_not_here_are_dropped(tmp_path):
    def about(i: int, *others: str) -> tuple[Record, bytes]:
        statements = [{"text": "both are red", "other": other, "label": True} for other in others]
        return made(i, statements=statements)

    unreadable = made(3)[0], b"GIF89a"
    samples = [
        about(0, "r1", "gone", "r2"),
        about(1, "r0"),
        about(2, "gone"),
        unreadable,
        about(4, "r3"),
        about(5, "r4"),
    ]
    report = check.check(check.read(samples, "f"))
    found = [(problem.record, problem.kind, problem.place[1:]) for problem in report.problems]
    lost = [("r0", "other-missing", (1,)), ("r2", "other-missing", (0,))]
    assert found == [("r3", "image-unreadable", ()), *lost]
    report = check.check(check.read(samples, "f"), fix=tmp_path / "fixed")
    assert report.problems == []
    fixed = Shards(tmp_path / "fixed")
    records = {record.id: record for record in (fixed.read(i)[0] for i in range(len(fixed)))}
    assert {name: [statement.other for statement in record.statements] for name, record in records.items()} == {
        **{"r0": ["r1", "r2"], "r1": ["r0"], "r2": []},
        **{"r4": [], "r5": ["r4"]},
    }
    dropped = [(change["record"], change["place"]) for change in changes(tmp_path / "fixed") if change["fix"] == "drop"]
    assert sorted(dropped) == [("r0", "statements.1"), ("r2", "statements.0"), ("r4", "statements.0")]
    assert check.check(check.packed(tmp_path / "fixed"), ignore=["other-missing"]).problems == []
    assert check.check(check.read(samples[:3], "f"), ignore=["other-missing"]).problems == []


def test_every_kind_is_explained_and_every_problem_reads_well():
    problem = Problem("box-outside", ("objects", 3, "box_xyxy"), "expected a box", [1, 2], where="f.tar", record="r")
    assert str(problem) == "f.tar: r: objects.3.box_xyxy: expected a box (found [1, 2]) [box-outside]"
    assert str(Problem("shard", (), "gone", where="f.tar")) == "f.tar: gone [shard]"
