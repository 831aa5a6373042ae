"""The pixels of an augmented image, as X-VLM has them: cropped, flipped, resized and changed by Pillow.

Colours are the reference's, but for sharpness, whose bytes overflow there and are clipped here. Pixels move by the
reference's maps; Pillow rounds between them to a finer step than OpenCV, and does not mix grey in at the border.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from xvlm.data.processor import to_tensor
from xvlm.data.randaugment import FACTOR, GREY, Operation, affine_of


def render(
    image: Image.Image,
    crop: Sequence[int],
    flip: bool,
    size: tuple[int, int],
    operations: Sequence[Operation],
    interpolation: Image.Resampling,
) -> UInt8[Tensor, "3 height width"]:
    """The crop of an RGB image, flipped or not, at ``size`` (height, width), after operations of RandAugment."""
    image = image.crop(tuple(crop))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(operated(image.resize((size[1], size[0]), interpolation), operations))


def operated(image: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    """The image after operations of RandAugment."""
    for operation in operations:
        image = warp(image, affine_of(operation, image.size)) if operation.moves else recolour(image, operation.name)
    return image


def recolour(image: Image.Image, name: str) -> Image.Image:
    """One operation of ``COLOUR``."""
    if name == "autocontrast":
        return tv.autocontrast(image)
    if name == "equalize":
        return tv.equalize(image)
    if name == "brightness":
        return tv.adjust_brightness(image, FACTOR)
    if name == "sharpness":
        return tv.adjust_sharpness(image, FACTOR)
    return image


def warp(
    image: Image.Image,
    affine: Float[np.ndarray, "2 3"],
    interpolation: Image.Resampling = Image.Resampling.BILINEAR,
    outside: int | tuple[int, int, int] = GREY,
) -> Image.Image:
    """The image after a map of pixel coordinates; ``outside`` is what comes from there."""
    back = np.linalg.inv(np.vstack([affine, [0, 0, 1]]))[:2]
    return image.transform(image.size, Image.Transform.AFFINE, back.ravel().tolist(), interpolation, fillcolor=outside)
