"""Records: what they refuse, and that shards written before a field was added still read."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from xvlm.__main__ import app
from xvlm.data.records import Expression, Record

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


@pytest.mark.parametrize("field", sorted(Record.model_fields))
def test_the_page_names_every_field(field):
    assert f"`{field}`" in PAGE
