"""Grounder: show it an image once, ask for as many phrases as you like."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from xvlm.data.processor import Processor
from xvlm.types import Concepts, Grounded, Texts


@runtime_checkable
class Method(Protocol):
    """A way of grounding: a task's box head, for one. Boxes are ``xyxy`` normalised to the image."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Concepts: ...

    def ground(self, texts: Texts, concepts: Concepts, about: Tensor) -> list[Grounded]: ...


class Grounder:
    """Finds phrases in an image.

    Example:
        >>> grounder = Grounder(pretraining.Task(config, model), processor)  # doctest: +SKIP
        >>> grounder.set_image(image)  # doctest: +SKIP
        >>> grounder.predict("the red disc").boxes_xyxy  # doctest: +SKIP
    """

    def __init__(self, method: Method, processor: Processor):
        self.method, self.processor = method, processor
        if isinstance(method, torch.nn.Module):
            method.eval()
        self.concepts: Concepts | None = None
        self.size: tuple[int, int] = (0, 0)

    @torch.inference_mode()
    def set_image(self, image: Image.Image | Path | str) -> None:
        """Encode an image; later questions are about it."""
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        image = image.convert("RGB")
        self.size = image.size
        self.concepts = self.method.encode(self.processor.pixel_values(image)[None].to(self.method.device))

    def predict(self, phrase: str) -> Grounded:
        """Where the phrase is; boxes are ``xyxy`` in pixels of the image given."""
        return self.predict_all([phrase])[0]

    @torch.inference_mode()
    def predict_all(self, phrases: Sequence[str]) -> list[Grounded]:
        """:meth:`predict` for many phrases in one pass.

        Raises:
            RuntimeError: no image yet.
        """
        if self.concepts is None:
            raise RuntimeError("no image yet: call set_image first")
        about = torch.zeros(len(phrases), dtype=torch.long, device=self.method.device)
        texts = self.processor.texts(list(phrases)).to(self.method.device)
        found = [each.to("cpu") for each in self.method.ground(texts, self.concepts, about)]
        scale = torch.tensor([self.size * 2], dtype=torch.float)
        return [replace(each, boxes_xyxy=each.boxes_xyxy * scale) for each in found]
