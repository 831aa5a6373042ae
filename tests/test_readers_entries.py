"""Files of annotations: what is wrong is named by file, entry, field and value; a check hears of every wrong entry."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from xvlm.data.readers.entries import Four, by_id, entry, listing, load, load_lines, numbered, only
from xvlm.data.records import Object


class Part(BaseModel):
    box: Four


class Thing(BaseModel):
    name: str
    id: int | str = 0
    box: Four | None = None
    parts: list[Part] = []


class File(BaseModel):
    things: list[Thing]


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_errors_name_file_entry_field_and_what_was_found(tmp_path):
    path = written(tmp_path / "things.json", [{"name": "a"}, {"name": 5}, {"name": 6}])
    with pytest.raises(ValueError, match=r"things\.json: 1\.name: Input should be a valid string \(found 5\)$"):
        load(list[Thing], path)
    path.write_text('{"name": "a"}\n\n{"nam": "a"}\n')
    lines = load_lines(Thing, path)
    assert next(lines) == (f"{path} line 1", Thing(name="a"))
    with pytest.raises(ValueError, match=r"things\.json line 3: name: Field required \(found \['nam'\]\)$"):
        next(lines)


BOX = [0, 0, 5, 5]
WRONG = [
    (5, "Input should be an object (found 5)"),
    (None, "Input should be an object (found None)"),
    ([], "Input should be an object (found [])"),
    ({}, "name: Field required (found [])"),
    ({"name": "a", "box": [1, 2]}, "box: expected 4 values (found [1, 2])"),
    ({"name": "a", "box": [1, 2, 3, 4, 5]}, "box: Tuple should have at most 4 items after validation, not 5 (found"),
    ({"name": "a", "box": {"x": 1}}, "box: Input should be a valid array (found {'x': 1})"),
    ({"name": "a", "box": [True, 0, 1, 1]}, "box.0: Input should be a valid number (found True)"),
    ({"name": "a", "box": ["1", 0, 1, 1]}, "box.0: Input should be a valid number (found '1')"),
    ({"name": "a", "box": [0, 0, 1, float("nan")]}, "box.3: Input should be a finite number (found nan)"),
    ({"name": "a", "box": [0, 10**400, 1, 1]}, "box.1: Input should be a finite number (found 1"),
    ({"name": "a", "id": None}, "id: Input should be a valid integer or a valid string (found None)"),
    ({"name": 3, "box": 4}, "name: Input should be a valid string (found 3); box: Input should be a valid array (fou"),
]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_wrong_entry_is_named_and_for_a_check_the_others_are_read(tmp_path, wrong, message, listed):
    path, errors = written(tmp_path / "a.json", {"things": [{"name": "a"}, wrong, {"name": "c"}, wrong]}), []
    separator = ": " if message[0].isupper() else "."
    if not listed:
        with pytest.raises(ValueError) as raised:
            load(File, path)
        assert str(raised.value).startswith(f"{path}: things.1{separator}{message.partition(';')[0]}")
        return
    with listing(errors):
        file = load(File, path)
    assert [str(error)[: str(error).index(" (found")] for error in errors] == [
        f"{path}: things.{i}{separator}{message[: message.index(' (found')]}" for i in (1, 3)
    ]
    assert [thing.name for thing in file.things] == ["a", "c"]
    assert [where for where, _ in numbered("things.", file.things)] == ["things.0", "things.2"]


def test_an_element_inside_an_entry_is_an_entry(tmp_path):
    things = [{"name": "a", "parts": [{"box": BOX}, {}, {"box": BOX[:3]}]}, {"parts": [{"box": BOX}]}, {"name": "c"}]
    errors = []
    with listing(errors):
        rest = load(list[Thing], written(tmp_path / "a.json", things))
    assert [str(error).partition("a.json: ")[2] for error in errors] == [
        "0.parts.1.box: Field required (found [])",
        "0.parts.2.box: expected 4 values (found [0, 0, 5])",
        "1.name: Field required (found ['parts'])",
    ]
    assert [(where, thing.name, len(thing.parts)) for where, thing in numbered("x.", rest)] == [
        ("x.0", "a", 1),
        ("x.2", "c", 0),
    ]


@pytest.mark.parametrize("content", ["{", "[" * 500, '{"things": 5}', "{}", "[]", "7", '"\\ud800"', ""])
def test_a_file_that_makes_no_sense_as_a_whole_is_an_error_for_a_check_too(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with listing([]), pytest.raises(ValueError, match=r"a\.json: ") as raised:
        load(File, tmp_path / "a.json")
    assert len(str(raised.value)) < 400


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"name": "a"}\n{"name": "b"}\n', encoding="utf-8")
    assert [thing.name for _, thing in load_lines(Thing, tmp_path / "a.json")] == ["a", "b"]


def test_an_id_that_an_earlier_entry_has_is_an_error():
    things, errors = [Thing(name="a", id=1), Thing(name="b", id=1), Thing(name="c", id="1")], []
    with pytest.raises(ValueError, match=r"^f: things\.1: id 1 is that of another entry before it$"):
        by_id("f: things.", things)
    with listing(errors):
        assert {key: thing.name for key, thing in by_id("f: things.", things).items()} == {1: "a", "1": "c"}
        assert list(by_id("f: things.", things[:1] * 2)) == [1]
    assert len(errors) == 1


def test_a_part_of_a_record_that_is_wrong_is_named_by_its_entry():
    expected = r"^here: label: String should have at least 1 character \(found ''\)$"
    with pytest.raises(ValueError, match=expected), entry("here"):
        Object(box_xyxy=BOX, label="")


def test_several_files_to_choose_from_are_named(tmp_path):
    for name in ("a_train.json", "b_train.json", "b_val.json"):
        (tmp_path / name).touch()
    assert only(tmp_path, "train.json", "*_val.json") == tmp_path / "b_val.json"
    assert only(tmp_path, "test.json") is None
    with pytest.raises(ValueError, match=r"expected one file \*_train\.json, found a_train\.json, b_train\.json"):
        only(tmp_path, "*_train.json")
