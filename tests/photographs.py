"""Photographs for tests of readers, made or real."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

REAL = Path(__file__).parents[2] / "shared/data"


def jpeg(width: int, height: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (width, height), (10, 120, 200)).save(data, format="JPEG")
    return data.getvalue()


def place(folder: Path, *names: str, size: tuple[int, int] = (100, 80)) -> None:
    """Writes photographs of this size (width, height)."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(*size))


def real(name: str) -> Path:
    """The folder of a real data set; the test is skipped where it is not at hand."""
    if not (REAL / name).is_dir():
        pytest.skip(f"the real data set is not at {REAL / name}")
    return REAL / name
