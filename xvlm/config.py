"""Configuration files: YAML with an optional base, ``key=value`` over it, checked against the object they configure.

A configuration object is a pydantic model beside the code it configures. Unknown keys, wrong types and values that are
not among the choices end in one :class:`ConfigError` that names the file, the key and the nearest known name.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and why."""


class Configured(BaseModel):
    """What configuration objects share: no unknown keys, no changes after loading, defaults checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Config = TypeVar("Config", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: ``1e-4`` is a number, ``no`` and ``off`` are words."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file, laid over the file its ``base`` names (mappings merge, everything else replaces)."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    return merge(read_yaml(path.parent / base), values) if base else values


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: mappings merge key by key, everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``a.b=value`` on top of nested mappings; values are read as YAML."""
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"{override!r}: expected key=value, for example optim.lr=1e-4")
        try:
            nested: Any = parse_yaml(text)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or error
            raise ConfigError(f"{override!r}: the value is not readable as YAML: {reason}; quotes may help") from None
        for key in reversed(path.split(".")):
            nested = {key: nested}
        values = merge(values, nested)
    return values


def load_config(config: type[Config], path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
        config: the pydantic model to build.
        path: a YAML file; its optional ``base:`` names another one, relative to it.
        overrides: ``a.b=value`` strings, laid over the file.

    Raises:
        ConfigError: naming file, key, what was found and what was expected.
    """
    return validate(config, apply_overrides(read_yaml(Path(path)), overrides), path)


def validate(config: type[Config], values: Any, origin: object) -> Config:
    """The object that values describe.

    Raises:
        ConfigError: a line for each wrong key, naming ``origin``, key, what was found and what was expected.
    """
    try:
        return config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {_explain(config, e)}" for e in error.errors())) from None


def dump_config(config: BaseModel) -> str:
    """YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _explain(config: type[BaseModel], error: Any) -> str:
    *parents, last = error["loc"] or ("",)
    model, named = _model_at(config, parents)
    key = ".".join([*named, str(last)])
    if error["type"] == "extra_forbidden":
        known = list(model.model_fields)
        nearest = difflib.get_close_matches(str(last), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {key!r}"
    if error["type"] in ("model_type", "model_attributes_type"):
        example = ".".join(filter(None, [key, next(iter(_model_at(config, error["loc"])[0].model_fields))]))
        message = f"expected keys with values, such as {example}, found {error['input']!r}"
        return f"{key}: {message}" if key else message
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        name = error["ctx"]["discriminator"].strip("'")
        return f"{key}.{name}: expected one of {tags} (found {tag!r}){_nearest(tag, tags)}"
    message = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
    if error["type"] == "literal_error":
        found += _nearest(str(error["input"]), error["ctx"]["expected"])
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _nearest(given: str, quoted: str) -> str:
    """A question after the choice that was probably meant, of those in quotes; nothing where none is near."""
    nearest = difflib.get_close_matches(given, re.findall(r"'([^']*)'", quoted), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _model_at(config: type[BaseModel], path: Sequence[Any]) -> tuple[type[BaseModel], list[str]]:
    """The model that a location leads to, through optional, list and tagged union types; the location without tags."""
    choices, named = [config], []
    for part in path:
        tagged = [model for model in choices if len(choices) > 1 and part in _tags(model)]
        if tagged:
            choices = tagged
            continue
        named.append(str(part))
        field = choices[0].model_fields.get(str(part))  # none: an index into a list
        choices = (_models_in(field.annotation) if field else []) or choices
    return choices[0], named


def _tags(model: type[BaseModel]) -> list[Any]:
    return [value for field in model.model_fields.values() for value in get_args(field.annotation)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
