"""Configurations: strict, with the nearest name; numbers and words mean what people mean; files round-trip."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from xvlm.config import ConfigError, Configured, dump_config, load_config, parse_yaml, validate


class Inner(Configured):
    lr: float = 1e-3
    mode: str = "no"
    norm: Literal["layer", "batch"] = "layer"


class Sit(Configured):
    name: Literal["sit"] = "sit"


class Stand(Configured):
    name: Literal["stand"] = "stand"


class Outer(Configured):
    steps: int
    task: Annotated[Sit | Stand, Field(discriminator="name")] = Sit()
    optim: Inner = Inner()
    parts: dict[str, Inner] = {}


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_numbers_and_words():
    read = parse_yaml("a: 1e-4\nb: no\nc: true\nd: -.5\ne: 3\nf: 2.\ng: off\nh: 1.5e+3")
    assert read == {"a": 1e-4, "b": "no", "c": True, "d": -0.5, "e": 3, "f": 2.0, "g": "off", "h": 1500.0}


def test_base_and_overrides(tmp_path):
    write(tmp_path, "base.yaml", "steps: 5\noptim: {lr: 1e-4, mode: fast}\n")
    path = write(tmp_path, "top.yaml", "base: base.yaml\noptim: {lr: 2e-4}\n")
    config = load_config(Outer, path, ["steps=7", "parts.a.lr=0.5"])
    assert (config.steps, config.optim.lr, config.optim.mode, config.parts["a"].lr) == (7, 2e-4, "fast", 0.5)
    again = load_config(Outer, write(tmp_path, "dumped.yaml", dump_config(config)))
    assert again == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\noptm: {}\n", r"top.yaml: unknown key 'optm'; did you mean 'optim'\?"),
        ("steps: 1\noptim: {lrs: 1}\n", r"unknown key 'optim.lrs'; did you mean 'lr'\?"),
        ("steps: 1\nparts: {x: {lrr: 1}}\n", r"unknown key 'parts.x.lrr'; did you mean 'lr'\?"),
        ("steps: many\n", r"steps: Input should be a valid integer.*'many'"),
        (
            "steps: 1\noptim: {norm: bach}\n",
            r"optim.norm: .*'layer' or 'batch' \(found 'bach'\); did you mean 'batch'\?$",
        ),
        ("optim: {}\n", "missing key 'steps'"),
        ("steps: 1\noptim: fast\n", r"top.yaml: optim: expected keys with values, such as optim\.lr, found 'fast'$"),
        ("steps: 1\noptim:\n", r"optim: expected keys with values, such as optim\.lr, found None$"),
        ("steps: 1\nparts: {x: 3}\n", r"parts\.x: expected keys with values, such as parts\.x\.lr, found 3$"),
        ("steps: 1\ntask: sit\n", r"top.yaml: task: expected keys with values, such as task\.name, found 'sit'$"),
        (
            "steps: 1\ntask: {name: sitt}\n",
            r"top.yaml: task\.name: expected one of 'sit', 'stand' \(found 'sitt'\); did you mean 'sit'\?$",
        ),
        ("- 1\n", "expected a mapping"),
        ("steps: [1\n", "not readable as YAML"),
        ("base: nowhere.yaml\n", "nowhere.yaml: no such configuration file"),
    ],
)
def test_errors_name_the_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, write(tmp_path, "top.yaml", text))


def test_an_override_without_equals_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(Outer, write(tmp_path, "top.yaml", "steps: 1\n"), ["steps"])


def test_a_value_that_is_no_yaml_is_one_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"'title=a: b: c': the value is not readable as YAML: [^\n]*$"):
        load_config(Outer, file, ["title=a: b: c"])


def test_what_is_no_mapping_at_all_is_explained():
    with pytest.raises(ConfigError, match=r"^a file: expected keys with values, such as lr, found \[1\]$"):
        validate(Inner, [1], "a file")
