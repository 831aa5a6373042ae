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
    implied |= {"model": "XVLM", "text_pooling": "first", "matching": "mlp", "heads": heads}
    return merge(implied, fields)


STEPS = {1: say_what_was_implied}  # from each older schema to the next
PRESENT = 1 + max(STEPS)


def write(config: BaseModel, model: str, folder: Path) -> None:
    """Write the configuration of a model; ``model``: the name of its class."""
    fields = {"schema": PRESENT, "model": model, **config.model_dump(mode="json")}
    hub.write_atomically(folder / FILE, json.dumps(fields, indent=2) + "\n")


def read(config: type[Config], model: str, folder: Path) -> Config:
    """The configuration in a folder, whichever schema it was written in.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: not a folder of ours, of another kind of model, or of a later version; a field that is missing,
            unknown or wrong, by name.
    """
    fields = _read(folder)
    if (kind := fields.pop("model")) != model:
        raise ConfigError(another(folder, kind, model))
    found = validate(config, fields, folder / FILE)
    if missing := list(_left_to_defaults(found)):
        raise ConfigError(f"{folder / FILE}: missing {', '.join(missing)}")
    return found


def kind(folder: Path) -> str:
    """Which class of model a folder holds. Raises as :func:`read`."""
    return _read(folder)["model"]


def another(place: Path, kind: str, asked: str) -> str:
    return f"{place}: holds a model of kind {kind}: load it with {kind}.from_pretrained, not {asked}'s"


def _read(folder: Path) -> Fields:
    file = folder / FILE
    if not file.exists():
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model" / FILE).exists() else ""
        raise FileNotFoundError(f"{folder}: no {FILE}; expected a folder written by save_pretrained{hint}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    number = fields.pop("schema", None) if isinstance(fields, dict) else None
    if number is None:
        raise ConfigError(f"{file}: no schema number, so save_pretrained did not write it")
    if not isinstance(number, int) or not 1 <= number <= PRESENT:
        raise ConfigError(f"{file}: schema {number!r}, this version reads 1 to {PRESENT}")
    for older in range(number, PRESENT):
        fields = STEPS[older](fields)
    if not isinstance(fields.get("model"), str):
        raise ConfigError(f"{file}: model {fields.get('model')!r}, expected the name of a class")
    return fields


def _left_to_defaults(config: BaseModel, inside: str = "") -> Iterator[str]:
    for name in type(config).model_fields:
        if name not in config.model_fields_set:
            yield f"{inside}{name}"
        elif isinstance(value := getattr(config, name), BaseModel):
            yield from _left_to_defaults(value, f"{inside}{name}.")
