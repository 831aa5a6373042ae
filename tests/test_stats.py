"""What is counted in a packed folder."""

import io

import pytest
from PIL import Image

from xvlm.data import stats
from xvlm.data.records import Expression, Object, Phrase, Record, Region
from xvlm.data.shards import write_shards

FILE = io.BytesIO()
Image.new("RGB", (100, 200)).save(FILE, "JPEG")


@pytest.fixture
def folder(tmp_path):
    small, large = (0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 100.0, 200.0)
    first = Record(
        id="1",
        source="one",
        width=100,
        height=200,
        captions=["A dog runs", "a dog"],
        regions=[Region(box_xyxy=large, descriptions=["the dog", "it"])],
        objects=[Object(box_xyxy=small, label="dog"), Object(box_xyxy=large, label="grass")],
        phrases=[Phrase(caption=0, start=0, end=5, boxes_xyxy=[small, small]), Phrase(caption=1, start=0, end=1)],
        expressions=[Expression(text="no cat")],
    )
    second = Record(id="2", source="two", width=100, height=200, captions=["nothing"])
    write_shards([(first, FILE.getvalue()), (second, FILE.getvalue())], tmp_path, progress=False)
    return tmp_path


def test_what_is_said_in_a_record_has_its_boxes(folder):
    said = stats.said_in(stats.Shards(folder).read(0)[0])
    assert list(said) == ["captions", "regions", "objects", "phrases", "expressions"]
    assert said["regions"][0] == (["the dog", "it"], [(0, 0, 100, 200)])
    assert [(one.texts, len(one.boxes_xyxy)) for one in said["phrases"]] == [(["A dog"], 2), (["a"], 0)]
    assert said["expressions"] == [(["no cat"], [])]


def test_counts_are_per_source_and_kind(folder):
    counted = stats.count(folder)
    assert counted.counts["two"] == {"records": 1, "captions": 1}
    assert counted.counts["one"] == {
        **{"records": 1, "captions": 2, "regions": 1, "descriptions": 2, "objects": 2, "phrases": 2, "expressions": 1},
        **{"boxes of regions": 1, "boxes of objects": 2, "boxes of phrases": 2},
    }
    assert counted.words["captions"] == [3, 2, 1]
    assert counted.boxes["objects"] == [(10, 0.005), (pytest.approx(20000**0.5), 1)]
    assert counted.vocabulary["captions"] == {"a": 2, "dog": 2, "runs": 1, "nothing": 1}
    assert counted.vocabulary["descriptions"] == {"the": 1, "dog": 1, "it": 1}


def test_counts_as_lines_and_distributions(folder):
    counted = stats.count(folder)
    lines = counted.lines()
    assert lines[0].startswith("one: 1 records; 2 captions, 1 regions, 2 descriptions, 1 boxes of regions")
    words = "words in captions: 2 (1 to 3 in 90 of 100), at most 3; 4 different, most often a 2, dog 2, "
    assert any(line.startswith(words) for line in lines)
    assert "boxes of objects: 50% small, 0% medium, 50% large; 50.2% of the image (median)" in lines
    assert not any("cannot be read" in line for line in lines)
    distributions = counted.distributions()
    assert distributions["words in captions"] == [3, 2, 1]
    assert distributions["boxes of phrases: side / image's"] == [0.005**0.5] * 2
    assert "boxes of expressions: side / image's" not in distributions


def test_counting_goes_on_behind_what_cannot_be_read(folder, caplog):
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"A dog runs", b'A dog"runs'))
    counted = stats.count(folder)
    assert (list(counted.counts), counted.broken) == (["two"], 1)
    assert counted.lines()[-1] == "1 record that cannot be read: not counted"
    assert "000000.tar/1" in caplog.text
