"""Boxes to choose among: of the records' objects, and detections from a file."""

import json
import re

import pytest

from xvlm.data import proposals
from xvlm.data.records import Object, Record


def record(name: str = "17", *boxes) -> Record:
    objects = [Object(box_xyxy=box, label="dog") for box in boxes]
    return Record(id=name, source="made", width=40, height=30, objects=objects, original_id="a/17.jpg")


def test_objects_propose_their_boxes_once():
    found = proposals.reader("objects")(record("17", (1, 2, 30, 20), (1, 2, 30, 20), (0, 0, 5, 5)))
    assert found.boxes_xyxy.tolist() == [[0, 0, 5, 5], [1, 2, 30, 20]]
    assert found.scores.tolist() == [1, 1] and found.size == (40, 30)
    assert proposals.reader("objects")(record()).boxes_xyxy.shape == (0, 4)
    assert proposals.reader("none") is None


def test_detections_are_read_as_the_reference_keeps_them(tmp_path):
    file = tmp_path / "dets.json"
    file.write_text(json.dumps({"17": [[1, 2, 10, 5.5], [30, 20, 20, 20, 0.25]], "a/17.jpg": [], "18": []}))
    found = proposals.from_file(file)(record())
    assert found.boxes_xyxy.tolist() == [[1, 2, 11, 7.5], [30, 20, 40, 30]]  # the second is cut off
    assert found.scores.tolist() == [1, 0.25]
    assert proposals.from_file(file)(record("18")).boxes_xyxy.shape == (0, 4)
    assert proposals.from_file(file)(record("19")).boxes_xyxy.shape == (0, 4)  # by its original_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object of images and their boxes, found list"),
        ('{"17": [[1, 2, 3]]}', "image 17: box 0: expected left, top, width, height and perhaps a score, found [1, 2"),
        ('{"17": [[1, 2, 3, true]]}', "image 17: box 0: expected left, top"),
        ('{"17": 3}', "image 17: expected a list of boxes, found 3"),
        ('{"17": [[0, 0, 9, 9], [50, 2, 9, 9]]}', "image 17: box 1 has no part in the image of 40 x 30 pixels"),
        ('{"18": []}', "has no proposals for record 17; give it an empty list if there are none"),
        ("{", "not readable as JSON"),
    ],
)
def test_what_a_file_lacks_is_said_with_its_name(content, message, tmp_path):
    file = tmp_path / "dets.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"dets\.json: {re.escape(message)}"):
        proposals.from_file(file)(record())


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file of proposals"):
        proposals.reader(tmp_path / "none.json")
