"""What a sample goes through before it is packed: decoding, a look at evaluation images, and a smaller image."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from xvlm.data.images import decode_image, encode_like, orientation
from xvlm.data.leaks import Guard
from xvlm.data.records import RLE, Record
from xvlm.data.shards import Remark
from xvlm.data.writing import Prepared


@dataclass(frozen=True)
class Preparation:
    """Turns a sample of a reader into one to pack, in any process.

    Args:
        max_side: images with a longer side are made smaller, and boxes and masks with them; others keep their bytes.
        allow_broken: leave samples out whose image cannot be decoded to its last row, instead of stopping.
        guard: knows the evaluation images; what it finds is left out, or with ``report_leaks`` packed with a remark.

    Raises:
        ValueError: an image that cannot be decoded, or of another size than its record says; names the record.
    """

    max_side: int | None = None
    allow_broken: bool = False
    guard: Guard | None = None
    report_leaks: bool = False

    def __call__(self, record: Record, image: bytes) -> Prepared:
        try:
            picture = decode_image(image, strict=True)
        except ValueError as error:
            if self.allow_broken:
                remark = Remark(record=record.id, why="unreadable", packed=False, message=str(error))
                return Prepared(None, (remark,))
            raise ValueError(f"{record.source} record {record.id!r}: {error} (allow_broken leaves it out)") from None
        if picture.size != (record.width, record.height):
            raise ValueError(
                f"{record.source} record {record.id!r}: the image is {picture.width}x{picture.height}, "
                f"the record says {record.width}x{record.height}"
            )
        remarks: tuple[Remark, ...] = ()
        if orientation(picture) != 1 and any(record.boxes()):
            message = "EXIF turns the picture; its boxes are taken to be of the stored pixels"
            remarks = (Remark(record=record.id, why="rotated", packed=True, message=message),)
        if self.guard is not None and (match := self.guard.match(record, picture)):
            leak = Remark(record=record.id, why="leak", packed=self.report_leaks, message=match)
            if not self.report_leaks:
                return Prepared(None, (leak,))
            remarks += (leak,)
        if self.max_side is not None and max(picture.size) > self.max_side:
            record, image = smaller(record, image, picture, self.max_side)
        return Prepared((record, image), remarks)


def smaller(record: Record, image: bytes, picture: Image.Image, max_side: int) -> tuple[Record, bytes]:
    """The sample with ``max_side`` pixels on the longer side of its image, in the same file format.

    Args:
        picture: ``image``, decoded.
    """
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    document = _scaled(record.model_dump(), (width / picture.width, height / picture.height), (width, height))
    return Record.model_validate(document | {"width": width, "height": height}), encode_like(resized, image)


def _scaled(value: Any, factors: tuple[float, float], size: tuple[int, int]) -> Any:
    """A part of a record with the boxes and masks in it scaled, at whatever depth they are."""
    if isinstance(value, list):
        return [_scaled(each, factors, size) for each in value]
    if not isinstance(value, dict):
        return value
    scaled = {}
    for name, inside in value.items():
        if name == "box_xyxy" and inside is not None:
            scaled[name] = _scaled_box(inside, factors, size)
        elif name == "boxes_xyxy":
            scaled[name] = [_scaled_box(box, factors, size) for box in inside]
        elif name == "mask" and inside is not None:
            scaled[name] = _scaled_mask(RLE.model_validate(inside), size).model_dump()
        else:
            scaled[name] = _scaled(inside, factors, size)
    return scaled


def _scaled_box(box_xyxy: tuple[float, ...], factors: tuple[float, float], size: tuple[int, int]) -> tuple[float, ...]:
    """Rounding must not push an edge out of the image."""
    return tuple(min(edge * factors[i % 2], float(size[i % 2])) for i, edge in enumerate(box_xyxy))


def _scaled_mask(mask: RLE, size: tuple[int, int]) -> RLE:
    import numpy as np
    from pycocotools import mask as coco_mask

    pixels = Image.fromarray(coco_mask.decode({"size": mask.size, "counts": mask.counts.encode()}) * np.uint8(255))
    # a pixel of the smaller mask is in where more than half of what it stands for was
    smaller = np.asarray(pixels.resize(size, Image.Resampling.BOX)) > 127
    encoded = coco_mask.encode(np.asfortranarray(smaller, dtype=np.uint8))
    return RLE(size=encoded["size"], counts=encoded["counts"].decode())
