"""Encoded images: what a strict decode refuses, and what it does not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xvlm.data.images import Undecodable, decode_image, orientation


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def photograph() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_jpeg_that_was_cut_and_given_an_end_is_refused_though_pillow_fills_it_up(mode, share):
    whole = jpeg(photograph().convert(mode))
    cut = whole[: int(len(whole) * share)] + b"\xff\xd9"
    assert decode_image(cut).getpixel((119, 89)) == (128, 128, 128)
    with pytest.raises(Undecodable, match=rf"image is damaged: .* \({len(cut)} bytes\)"):
        decode_image(cut, strict=True)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_that_was_meant_and_bytes_too_many_are_no_damage(mode, progressive):
    padded = Image.new("RGB", (120, 180), "gray")
    padded.paste(photograph())
    whole = jpeg(padded.convert(mode), progressive=progressive)
    for data in (whole, whole + b"more", whole[:-2] + bytes(range(1, 9)) + whole[-2:]):
        assert decode_image(data, strict=True).tobytes() == decode_image(data).tobytes()


def test_damage_in_the_middle_is_refused():
    whole = jpeg(photograph())
    middle = len(whole) // 2
    with pytest.raises(Undecodable, match="image is damaged"):
        decode_image(whole[:middle] + bytes(500) + whole[middle + 500 :], strict=True)


def test_no_image_is_opened_by_a_decoder_that_runs_another_program():
    opened = [
        f"{file}: {line}"
        for file in (Path(__file__).parents[1] / "xvlm").rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line and "formats=READABLE" not in line
    ]
    assert opened == []


@pytest.mark.parametrize(("said", "is_read_as"), [(1, 1), (6, 6), (8, 8), (0, 1), (9, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_orientation_is_read_from_what_is_opened_and_what_is_decoded(said, is_read_as, mode):
    exif = Image.Exif()
    exif[0x0112] = said
    data = jpeg(photograph().convert(mode), exif=exif)
    assert orientation(Image.open(io.BytesIO(data))) == orientation(decode_image(data)) == is_read_as
