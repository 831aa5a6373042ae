"""Golden outputs: what a model answers to a fixed input, kept beside its weights to prove that they load right.

A file of weights may load without complaint and still be read differently: by another version of a library, with
another configuration, on a machine that multiplies with fewer digits. The answers tell. What a small change of the
weights themselves would leave within the tolerance, the SHA-256 of their file tells.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xvlm import hub
from xvlm.models import convert
from xvlm.models.vision import regions_in_pixels
from xvlm.types import Texts

if TYPE_CHECKING:
    from xvlm.models.xvlm import Pretrained

FILE = "golden.safetensors"
WEIGHTS = "model.safetensors"
TOLERANCE = 1e-4  # absolute, and relative where values are large; float32 on other processors differs by about 1e-5
VOCABULARY_SAMPLE = 64


@torch.no_grad()
def outputs(model: "Pretrained") -> dict[str, Tensor]:
    """What the model, in evaluation mode and float32, answers to the fixed input of its size.

    The input is one image, two of its boxes and two texts. It is made of whole numbers: the same bits on any machine.
    """
    height, width = model.config.vision.image_size
    channel, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    image = (3 * x + 5 * y + 70 * channel + x * y // 16) % 256 / 127.5 - 1

    corners = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.5, 0.0, 0.75, 0.75]])  # left, top, right, bottom
    boxes_xyxy = corners * torch.tensor([width, height, width, height])
    regions = regions_in_pixels(boxes_xyxy, torch.tensor([0, 0]), (height, width))

    words = min(8, model.config.text.max_positions // 2)
    ids = 5 + torch.arange(2 * words).view(2, words) * 7919 % (model.config.text.vocab_size - 5)
    mask = torch.ones(2, words, dtype=torch.bool)
    mask[1, words // 2 :] = False
    return model.answers(image[None], regions, Texts(ids, mask))


def sample(logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row word"]:
    """Logits of a few words of the vocabulary, spread over it: the file stays small."""
    return logits[:, :: max(1, logits.shape[1] // VOCABULARY_SAMPLE)].clone()


def write(model: "Pretrained", folder: Path) -> None:
    """Write a model's golden outputs, and which file of weights gave them, into the folder it was loaded from."""
    answers = {name: tensor.contiguous() for name, tensor in outputs(model).items()}
    with hub.replacing(folder / FILE) as unfinished:
        save_file(answers, unfinished, metadata={WEIGHTS: hub.sha256(folder / WEIGHTS)})


def differences(model: "Pretrained", folder: Path) -> tuple[dict[str, float], bool]:
    """How far a model is from the golden outputs in its folder.

    Returns:
        The largest absolute difference of each output, and whether all are within :data:`TOLERANCE`.

    Raises:
        FileNotFoundError: the folder has no golden outputs.
        ValueError: the file is damaged, belongs to another file of weights, or holds another set of arrays or other
            shapes than this version makes.
    """
    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{folder}: no {FILE}; save_pretrained writes it")
    expected, found = convert.read_checkpoint(folder / FILE), outputs(model)
    with safe_open(folder / FILE, "pt") as file:
        weights = (file.metadata() or {}).get(WEIGHTS)  # the first folders do not say it
    if weights not in (None, hub.sha256(folder / WEIGHTS)):
        raise ValueError(f"{folder / WEIGHTS}: changed since {FILE} was written, its SHA-256 was {weights}")
    shapes, wanted = ({name: tuple(t.shape) for name, t in side.items()} for side in (found, expected))
    if shapes != wanted:
        raise ValueError(f"{folder / FILE}: holds {wanted}, but this model gives {shapes}")
    largest = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    near = all(torch.allclose(found[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE) for name in found)
    return largest, near
