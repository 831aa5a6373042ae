"""The ``xvlm`` command: what it prints and writes, and one clear line where something is missing."""

import subprocess
import sys

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

from xvlm import hub
from xvlm.__main__ import app, main
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.shards import Shards
from xvlm.models.xvlm import XVLM


@pytest.fixture
def folder(tmp_path):
    """Weights of a tiny model that knows the words of scenes, and their processor."""
    processor = Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32, max_tokens=16))
    text = tiny.TEXT.model_copy(update={"vocab_size": processor.vocab_size})
    XVLM(tiny.CONFIG.model_copy(update={"text": text})).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path):
    scene = scenes.sample_scene(scenes.SceneConfig(), "test", 0)
    Image.fromarray(scenes.draw(scene, 96)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def lines_of(*arguments) -> list[str]:
    """What a command prints; it must end well."""
    ran = CliRunner().invoke(app, [str(word) for word in arguments])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return ran.stdout.splitlines()


def error_of(monkeypatch, *arguments) -> str:
    """The one line with which the command ends; ``sys.exit`` with a text prints it and sets status 1."""
    monkeypatch.setattr(sys, "argv", ["xvlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    message = stopped.value.code
    assert isinstance(message, str), message
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_help_lists_the_commands_without_importing_torch():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "xvlm", "--help"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    for command in ("demo", "ground", "data"):
        assert f" {command} " in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "xvlm.hub" in imported
    assert imported.isdisjoint({"torch", "timm", "transformers", "accelerate"})


def test_scenes_are_packed_and_shown(tmp_path):
    printed = lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "test", "--limit", 6)
    assert printed[-1] == f"{tmp_path / 'shards/test'}: 6 records"
    assert len(Shards(tmp_path / "shards/test")) == 6
    sheet = tmp_path / "sheet.png"
    assert lines_of("data", "show", tmp_path / "shards/test", "--out", sheet, "--count", 4) == [str(sheet)]
    assert min(Image.open(sheet).size) > 128


def test_ground_prints_a_line_for_each_phrase_and_draws(folder, picture, tmp_path):
    phrases, drawn = ["the small red disc", "a star"], tmp_path / "drawn.png"
    *found, written = lines_of("ground", picture, *phrases, "--model", folder, "--out", drawn)
    assert [line.partition(": ")[0] for line in found] == phrases
    for line in found:
        left, top, right, bottom = map(float, line.partition(": ")[2].split())
        assert -96 <= left <= right <= 192
        assert -96 <= top <= bottom <= 192
    assert written == str(drawn)
    assert Image.open(drawn).width >= 96


def test_an_unknown_model_ends_in_one_line_that_names_the_shipped_ones(monkeypatch, picture, tmp_path):
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    (tmp_path / "weights/one-that-ships").mkdir(parents=True)
    message = error_of(monkeypatch, "ground", picture, "a star", "--model", "no-such-model")
    assert "no-such-model" in message
    assert "one-that-ships" in message


def test_a_missing_picture_and_missing_shards_end_in_one_line(monkeypatch, tmp_path):
    assert "absent.png" in error_of(monkeypatch, "ground", tmp_path / "absent.png", "a star")
    assert "absent" in error_of(monkeypatch, "data", "show", tmp_path / "absent")


def test_scenes_without_a_limit_end_in_one_line(monkeypatch, tmp_path):
    assert "number" in error_of(monkeypatch, "data", "pack", "scenes", tmp_path)
