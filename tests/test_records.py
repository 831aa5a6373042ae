"""Records: what they refuse, and that shards written before a field was added still read."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pydantic import ValidationError
from typer.testing import CliRunner

from xvlm.__main__ import app
from xvlm.data.records import Expression, Record, is_mask

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
LEAST = {"id": "1", "source": "made", "width": 100, "height": 80}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"id": "a/b"}, "usable as a file name"),
        ({"regions": [{"box_xyxy": [0, 0, 101, 80], "descriptions": ["a"]}]}, r"regions\.0: box \(0, 0, 101, 80\)"),
        ({"objects": [{"box_xyxy": [9, 0, 9, 8], "label": "a"}]}, r"objects\.0: box .* inside the 100x80 image"),
        ({"expressions": [{"text": "a", "box_xyxy": [-1, 0, 9, 8]}]}, r"expressions\.0: box \(-1, 0, 9, 8\)"),
        (
            {"expressions": [{"text": "a", "box_xyxy": [0, 0, 9, 8], "boxes_xyxy": [[0, 0, 9, 8], [0, 0, 9, 81]]}]},
            r"expressions\.0: box \(0, 0, 9, 81\)",
        ),
        ({"captions": ["a"], "phrases": [{"caption": 1, "start": 0, "end": 1}]}, r"phrases\.0: caption 1 of 1"),
        ({"captions": ["a"], "phrases": [{"caption": 0, "start": 0, "end": 2}]}, r"phrases\.0: span 0:2 is outside"),
        ({"captions": [""]}, r"captions\.0"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_records_refuse(said, message):
    with pytest.raises(ValidationError, match=message):
        Record.model_validate(LEAST | said)


def test_records_of_before_a_field_was_added_read_as_they_did():
    before = LEAST | {"questions": [{"text": "is it", "answers": {"yes": 1.0}, "kind": "yes/no"}]}
    record = Record.model_validate(before | {"expressions": [{"text": "a dog", "box_xyxy": [0, 0, 9, 8]}]})
    assert record.expressions == [Expression(text="a dog", box_xyxy=(0, 0, 9, 8))]
    assert (record.original_id, record.same_as, record.questions[0].id) == ("", {}, "")


def test_the_command_prints_a_schema_that_says_what_fields_are():
    ran = CliRunner().invoke(app, ["data", "schema"])
    schema = json.loads(ran.stdout)
    assert schema["required"] == ["id", "source", "width", "height"]
    assert set(schema["properties"]) == set(Record.model_fields)
    assert schema["properties"]["same_as"]["description"].startswith("Other collections")
    assert "box around all" in schema["$defs"]["Expression"]["properties"]["box_xyxy"]["description"]


def test_the_command_prints_a_schema_of_lines_that_people_write():
    schema = json.loads(CliRunner().invoke(app, ["data", "schema", "--lines"]).stdout)
    assert set(schema["properties"]) == {*Record.model_fields, "image", "image_base64"}
    assert (schema["required"], len(schema["oneOf"]), schema["additionalProperties"]) == ([], 2, False)
    for thing, needed in (("Region", ["descriptions"]), ("Object", ["label"]), ("Expression", ["text"])):
        one = schema["$defs"][thing]
        assert {"box_xyxy", "box_xywh"} <= one["properties"].keys()
        assert one["required"] == needed
        assert ("oneOf" in one) == (thing != "Expression")  # which may name nothing in the image


@pytest.mark.parametrize("field", sorted(Record.model_fields))
def test_the_page_names_every_field(field):
    assert f"`{field}`" in PAGE


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([0, 0.02, 0.5, 1]))
def test_a_mask_is_known_by_its_run_lengths(height, width, seed, share):
    pixels = np.random.default_rng(seed).random((height, width)) < share
    counts = coco_mask.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"].decode()
    changes = np.flatnonzero(np.diff(np.r_[0, pixels.ravel("F")]))  # where a run ends, down the columns
    lengths = np.diff(np.r_[0, changes, pixels.size]).tolist()
    assert is_mask((height, width), counts) and is_mask((height, width), lengths)
    assert not is_mask((height, width + 1), counts)
    for other in ("", "~", "\x00", "é", "PPPPPPPPPPPP", counts[:-1] + "~", [*lengths[:-1], -1], [-1, pixels.size + 1]):
        assert not is_mask((height, width), other)
