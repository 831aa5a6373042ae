"""``config.json`` of a folder: the number of its schema, and the named steps from older ones to the present.

A folder writes out every field its numbers depend on, so that a default which changes later does not change what it
means. Whoever adds or renames a field of a configuration adds a step that gives older folders what they stood for.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from xvlm import hub
from xvlm.config import Config, ConfigError, merge, validate

FILE = "config.json"
Fields = dict[str, Any]


def say_what_was_implied(fields: Fields) -> Fields:
    """1 -> 2: these came one after the other; a folder that lacks one was written when there was nothing else."""
    heads = ["image_projection", "text_projection", "temperature", "itm_head", "box_head", "word_head"]
    implied = {"vision": {"local_layers": 0}, "text": {"position_offset": 0, "looks": 1}}
    return merge({**implied, "text_pooling": "first", "heads": heads}, fields)


STEPS = {1: say_what_was_implied}  # from each older schema to the next
PRESENT = 1 + max(STEPS)


def write(config: BaseModel, folder: Path) -> None:
    fields = {"schema": PRESENT, **config.model_dump(mode="json")}
    hub.write_atomically(folder / FILE, json.dumps(fields, indent=2) + "\n")


def read(config: type[Config], folder: Path) -> Config:
    """The configuration in a folder, whichever schema it was written in.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: not a folder of ours or one of a later version; a field that is missing, unknown or wrong, by name.
    """
    file = folder / FILE
    if not file.exists():
        raise FileNotFoundError(f"{folder}: no {FILE}; expected a folder written by save_pretrained")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    number = fields.pop("schema", None) if isinstance(fields, dict) else None
    if number is None:
        raise ConfigError(f"{file}: no schema number, so save_pretrained did not write it")
    if number not in range(1, PRESENT + 1):
        raise ConfigError(f"{file}: schema {number!r}, this version reads 1 to {PRESENT}")
    for older in range(number, PRESENT):
        fields = STEPS[older](fields)
    found = validate(config, fields, file)
    if missing := list(_left_to_defaults(found)):
        raise ConfigError(f"{file}: missing {', '.join(missing)}")
    return found


def _left_to_defaults(config: BaseModel, inside: str = "") -> Iterator[str]:
    for name in type(config).model_fields:
        if name not in config.model_fields_set:
            yield f"{inside}{name}"
        elif isinstance(value := getattr(config, name), BaseModel):
            yield from _left_to_defaults(value, f"{inside}{name}.")
