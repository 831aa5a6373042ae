"""Encoded images: decoded safely, or written anew. Nothing here imports torch, so that many processes start quickly."""

import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg

JPEG = ("JPEG", "MPO")  # MPO: a JPEG file with more pictures behind the first, as phones write
READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of others, Pillow has some read by a program (EPS)
PNG = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 100_000_000
QUALITY = 95  # of JPEG and WebP files that are written anew
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, the turned picture is as wide as the stored one is high

# What libjpeg says of data that are missing or wrong. Less than ten bytes too many, as some cameras write, are no sign.
_DAMAGED = re.compile(r"Premature end|Corrupt JPEG data: (?!\d extraneous)")


class Undecodable(ValueError):
    """Why an image cannot be decoded."""


class Empty(Undecodable):
    """It has no bytes, or no pixels."""


def open_image(data: bytes) -> Image.Image:
    """An encoded image of which only the header has been read: it has a size, and :func:`rgb` decodes it.

    Raises:
        Undecodable: the bytes are no image, or one of more than 100 megapixels; Empty: of none.
    """
    if not data:
        raise Empty("the image has no bytes")
    if data[:8] == PNG and data[12:16] == b"IHDR" and 0 in struct.unpack(">II", data[16:24].ljust(8, b"\xff")):
        raise Empty("the image has no pixels")
    with _decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
        image = Image.open(BytesIO(data), formats=READABLE)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
        return image


def orientation(image: Image.Image) -> int:
    """How its EXIF wants an image turned or mirrored, from 1 (as it is stored) to 8."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF is a format of its own, and as often broken as any
        return 1
    return turned if turned in range(1, 9) else 1


def rgb(image: Image.Image) -> Image.Image:
    """An opened image decoded, in RGB. Its EXIF orientation is left alone: boxes are of the stored pixels.

    Raises:
        Undecodable: the file ends early or is damaged.
    """
    with _decoding():
        image.load()
        return image if image.mode == "RGB" else _eight_bits(image).convert("RGB")  # from RGB to RGB would copy


def is_undecoded_jpeg(image: Image.Image) -> bool:
    """Whether it is one that :func:`decode_small` can decode smaller."""
    return image.format in JPEG and bool(image.tile)


def decode_small(image: Image.Image, scale: int) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an opened image in RGB; those of a JPEG at ``1 / scale`` (1, 2, 4 or 8) of its size, rounded up.

    Raises:
        Undecodable: as :func:`rgb`.
    """
    if is_undecoded_jpeg(image):
        small = {"min_height": math.ceil(image.height / scale), "min_width": math.ceil(image.width / scale)}
        with suppress(ValueError):  # damage, of which Pillow says more
            if image.mode != "CMYK":  # which simplejpeg turns to RGB with other rounding; else the pixels are Pillow's
                return decode_jpeg(image.fp.getbuffer(), "RGB", min_factor=scale, **small)
        image.draft("RGB", (image.width // scale, image.height // scale))
    return np.asarray(rgb(image))


def decode_image(data: bytes, *, strict: bool = False) -> Image.Image:
    """An RGB image from an encoded file.

    Args:
        strict: refuse a JPEG with damage that libjpeg notices, which Pillow fills up with grey and says nothing.

    Raises:
        Undecodable, Empty: as :func:`open_image` and :func:`rgb`.
    """
    try:
        image = open_image(data)
        picture = rgb(image)
        if strict and image.format in JPEG and (damage := _damage(data)):
            raise Undecodable(f"image is damaged: {damage}")
        return picture
    except Undecodable as error:
        raise type(error)(f"{error} ({len(data)} bytes)") from None


def _damage(jpeg: bytes) -> str:
    """What libjpeg says is wrong with the data of a JPEG that Pillow decodes; nothing: an empty text."""
    try:
        decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=8)  # reads all of it, draws little
    except ValueError as error:  # also of kinds that it does not read, as Pillow does
        return str(error) if _DAMAGED.match(str(error)) else ""
    return ""


@contextmanager
def _decoding() -> Iterator[None]:
    """Decoders raise whatever the bytes make them trip over."""
    try:
        yield
    except UnidentifiedImageError:
        raise Undecodable("image cannot be decoded: neither JPEG, PNG, WebP, GIF, BMP nor TIFF") from None
    except Image.DecompressionBombError:  # Pillow's limit is above ours, and its message names that
        raise Undecodable(f"image cannot be decoded: it has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise Undecodable(f"image cannot be decoded: {error}") from None


def plain(data: bytes, *, turn: bool) -> Image.Image:
    """The first frame of an image as RGB with 8 bits a channel; what is transparent lies on white.

    Args:
        turn: the way its EXIF orientation says.
    """
    image = open_image(data)
    if turn:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; Pillow's own conversion cuts off at 255, and all but the darkest turns white."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def encode_like(image: Image.Image, data: bytes) -> bytes:
    """An RGB image in the format of another file: JPEG, WebP, or else PNG."""
    kind, file = open_image(data).format, BytesIO()
    image.save(file, "JPEG" if kind in JPEG else "WEBP" if kind == "WEBP" else "PNG", quality=QUALITY)
    return file.getvalue()
