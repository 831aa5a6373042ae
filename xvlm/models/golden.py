"""Golden outputs: what a model answers to a fixed input, kept beside its weights to prove that they load right.

A file of weights may load without complaint and still be read differently: by another version of a library, with
another configuration, on a machine that multiplies with fewer digits. The answers tell.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xvlm import hub
from xvlm.types import Regions, Texts

if TYPE_CHECKING:
    from xvlm.models.xvlm import XVLM

FILE = "golden.safetensors"
TOLERANCE = 1e-4  # absolute, and relative where values are large; float32 on other processors differs by about 1e-5
VOCABULARY_SAMPLE = 64  # of the word logits, so that the file stays small


@torch.no_grad()
def outputs(model: "XVLM") -> dict[str, Tensor]:
    """What the model, in evaluation mode and float32, answers to the fixed input of its size.

    The input is one image, two of its boxes and two texts. It is made of whole numbers: the same bits on any machine.

    Returns:
        Fused states; and by the heads the model has, unit vectors of image, boxes and texts, matching logits, boxes and
        a sample of the word logits.
    """
    height, width = model.config.vision.image_size
    channel, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    image = (3 * x + 5 * y + 70 * channel + x * y // 16) % 256 / 127.5 - 1

    corners = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.0, 0.25, 0.75]])  # left, top, width, height
    size = torch.tensor([width, height, width, height])
    centred = torch.cat([corners[:, :2] + corners[:, 2:] / 2, corners[:, 2:]], 1)
    regions = Regions(torch.tensor([0, 0]), centred, corners * size, torch.tensor([False, False]))

    words = min(8, model.config.text.max_positions // 2)
    vocabulary = model.config.text.vocab_size
    ids = 5 + torch.arange(2 * words).view(2, words) * 7919 % (vocabulary - 5)
    mask = torch.ones(2, words, dtype=torch.bool)
    mask[1, words // 2 :] = False

    concepts = model.encode_image(image[None], regions)
    texts = model.encode_text(Texts(ids, mask))
    # Questions: both texts about the whole image, and about a box each; a second look is at the next concept.
    about = (torch.tensor([0, 0, 1, 2])[:, None] + torch.arange(model.config.text.looks)) % 3
    fused = model.fuse(texts, concepts, about, torch.tensor([0, 1, 0, 1]))
    answers = {
        "image_projection": lambda: {"image_embedding": model.embed_image(concepts)},
        "text_projection": lambda: {"text_embedding": model.embed_text(texts)},
        "itm_head": lambda: {"matching": model.match(fused)},
        "box_head": lambda: {"boxes_cxcywh": model.locate(fused)},
        "word_head": lambda: {
            "words": model.guess_words(fused.first)[:, :: max(1, vocabulary // VOCABULARY_SAMPLE)].clone()
        },
    }
    found = {"fused": fused.first}
    for head in model.config.heads:
        found |= answers.get(head, dict)()
    return found


def write(model: "XVLM", folder: Path) -> None:
    """Write a model's golden outputs into the folder it was loaded from."""
    answers = {name: tensor.contiguous() for name, tensor in outputs(model).items()}
    with hub.replacing(folder / FILE) as unfinished:
        save_file(answers, unfinished)


def differences(model: "XVLM", folder: Path) -> tuple[dict[str, float], bool]:
    """How far a model is from the golden outputs in its folder.

    Returns:
        The largest absolute difference of each output, and whether all are within :data:`TOLERANCE`.

    Raises:
        FileNotFoundError: the folder has no golden outputs.
        ValueError: they are of another shape or another set than this version makes.
    """
    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{folder}: no {FILE}; save_pretrained writes it")
    expected, found = load_file(folder / FILE), outputs(model)
    shapes, wanted = ({name: tuple(t.shape) for name, t in side.items()} for side in (found, expected))
    if shapes != wanted:
        raise ValueError(f"{folder / FILE}: holds {wanted}, but this model gives {shapes}")
    largest = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    near = all(torch.allclose(found[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE) for name in found)
    return largest, near
