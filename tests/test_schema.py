"""Folders of every schema there was load, mean what they meant, and say what is wrong where they do not."""

import json

import pytest
import tiny

from xvlm.config import ConfigError
from xvlm.models import golden, schema
from xvlm.models.xvlm import XVLM

# What the first folders said, all of it; the model of tests/tiny.py.
FIRST = {
    "schema": 1,
    "vision": {
        "trunk": "swin_tiny_patch4_window7_224",
        "options": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "image_size": [32, 32],
        "pooling": "hard",
        "positions": False,
        "freeze_statistics": False,
    },
    "text": {
        "vocab_size": 60,
        "dim": 16,
        "heads": 2,
        "feed_forward": 32,
        "text_layers": 2,
        "cross_layers": 2,
        "max_positions": 16,
        "token_types": 2,
        "dropout": 0.0,
        "norm_eps": 1e-12,
    },
    "embed_dim": 8,
    "temperature": 0.07,
}


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    return tmp_path


def put(folder, fields):
    (folder / schema.FILE).write_text(json.dumps(fields))


def fields_of(folder):
    return json.loads((folder / schema.FILE).read_text())


def test_a_folder_of_the_first_schema_answers_as_it_did(folder):
    put(folder, FIRST)
    model = XVLM.from_pretrained(folder)
    assert model.config == tiny.CONFIG
    assert golden.differences(model, folder)[1]
    model.save_pretrained(folder)
    assert fields_of(folder)["schema"] == schema.PRESENT
    assert XVLM.from_pretrained(folder).config == tiny.CONFIG


def test_a_field_that_came_while_the_number_stayed_keeps_its_value(folder):
    put(folder, FIRST | {"heads": ["box_head"], "text": FIRST["text"] | {"position_offset": 2}})
    config = schema.read(type(tiny.CONFIG), "XVLM", folder)
    assert config.heads == ("box_head",)
    assert (config.text.position_offset, config.text.looks) == (2, 1)


def test_every_older_schema_has_a_step_and_each_step_fills_what_the_next_one_asks_for():
    assert sorted(schema.STEPS) == list(range(1, schema.PRESENT))
    fields = {name: value for name, value in FIRST.items() if name != "schema"}
    for number in sorted(schema.STEPS):
        fields = schema.STEPS[number](fields)
    assert fields == {"model": "XVLM", **tiny.CONFIG.model_dump(mode="json")}


def test_the_present_schema_leaves_nothing_to_defaults(folder):
    fields = fields_of(folder)
    del fields["text"]["looks"], fields["heads"]
    put(folder, fields)
    with pytest.raises(ConfigError, match=r"config.json: missing text.looks, heads"):
        XVLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("<html>", "not readable as JSON"),
        ("[1]", "no schema number, so save_pretrained did not write it"),
        (json.dumps({"model_type": "bert", "hidden_size": 768}), "no schema number"),
        (json.dumps(FIRST | {"schema": 99}), f"schema 99, this version reads 1 to {schema.PRESENT}"),
        (json.dumps(FIRST | {"schema": "1"}), "schema '1', this version reads"),
        (json.dumps(FIRST | {"schema": 1.0}), "schema 1.0, this version reads"),
        (json.dumps(FIRST | {"model": ["XVLM"]}), r"model \['XVLM'\], expected the name of a class"),
        (json.dumps({"schema": schema.PRESENT}), "model None, expected the name of a class"),
        (json.dumps(FIRST | {"embed_dims": 8}), "unknown key 'embed_dims'; did you mean 'embed_dim'"),
        (json.dumps(FIRST | {"text": FIRST["text"] | {"heads": 0}}), "text.heads: .* greater than or equal to 1"),
        (json.dumps(FIRST | {"embed_dim": "wide"}), r"embed_dim: .* \(found 'wide'\)"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_the_file(folder, content, why):
    (folder / schema.FILE).write_text(content)
    with pytest.raises(ConfigError, match=rf"config.json: {why}"):
        XVLM.from_pretrained(folder)


def test_a_folder_without_a_configuration_is_refused(folder):
    (folder / schema.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json; expected a folder written by save_pretrained"):
        XVLM.from_pretrained(folder)
