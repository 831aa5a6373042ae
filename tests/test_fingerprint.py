"""A source's fingerprint: any file that may say something of images changes it, photographs do not."""

import os
from pathlib import Path

import pytest

from xvlm.data.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    for name in ("annotations/a.json", "images/1.jpg", "packed/train/index.json"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text(name)
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("behind a link")
    (tmp_path / "elsewhere/back").symlink_to(source)
    (tmp_path / "elsewhere/nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "elsewhere/itself").symlink_to(tmp_path / "elsewhere/itself")
    return source


def of(folder: Path, *absent: str) -> str:
    return fingerprint(folder, absent, leave_out=folder / "packed")


CHANGES = {
    "text": lambda folder: (folder / "annotations/a.json").write_text("annotations/b.json"),
    "time": lambda folder: os.utime(folder / "annotations/a.json", (1, 1)),
    "name": lambda folder: (folder / "annotations/a.json").rename(folder / "annotations/b.json"),
    "another": lambda folder: (folder / "annotations/b.json").write_text(""),
    "behind a link": lambda folder: (folder / "link/b.txt").write_text("changed"),
    "no longer absent": lambda folder: (folder / "images/2.jpg").write_text(""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_changes_with_annotations_and_absent_images_that_come(folder, change):
    before = of(folder, "a/2.jpg", "7")
    change(folder)
    assert of(folder, "a/2.jpg", "7") != before


def test_it_does_not_change_with_other_images_or_with_what_is_packed(folder):
    before = of(folder, "9.jpg")
    (folder / "images/2.jpg").write_text("")
    (folder / "images/1.jpg").unlink()
    (folder / "packed/train/000000.tar").write_text("")
    assert of(folder, "9.jpg") == of(folder) == before
