"""Records with their images, as they lie in packed folders."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xvlm.data.images import Undecodable, open_image, rgb
from xvlm.data.processor import Processor
from xvlm.data.records import Record
from xvlm.data.shards import BrokenSample, Shards

NAMED = 20  # broken records that a warning names

logger = logging.getLogger(__name__)


def read_image(shards: Shards, i: int) -> tuple[Record, Image.Image]:
    """A record and its image, of which only the header has been decoded.

    Raises:
        BrokenSample: also where the image cannot be opened or has not the record's size.
    """
    record, data = shards.read(i)
    with broken_if_undecodable(shards, i):
        image = open_image(data)
    if image.size != (record.width, record.height):
        found = f"image is {image.width}x{image.height}, the record says {record.width}x{record.height}"
        raise shards.broken(i, found)
    return record, image


@contextmanager
def broken_if_undecodable(shards: Shards, i: int) -> Iterator[None]:
    """Turns what is wrong with the image of a sample into a BrokenSample that names it."""
    try:
        yield
    except Undecodable as error:
        raise shards.broken(i, str(error)) from None


def records(
    shards: Shards, processor: Processor, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[list[Record], Float[Tensor, "image 3 height width"]]]:
    """Every record once, in the order of ``indices``, with its resized and normalised image; ``batch_size`` at a time.

    Broken samples are left out, counted and logged.
    """
    broken: list[str] = []
    for first in range(0, len(indices), batch_size):
        some, images = [], []
        for i in indices[first : first + batch_size]:
            try:
                record, image = read_image(shards, i)
                with broken_if_undecodable(shards, i):
                    images.append(processor.pixel_values(rgb(image)))
            except BrokenSample as error:
                broken.append(str(error))
                continue
            some.append(record)
        if some:
            yield some, torch.stack(images)
    if broken:
        logger.warning("left out %d of %d records:\n%s", len(broken), len(indices), "\n".join(broken[:NAMED]))
