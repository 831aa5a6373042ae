"""Grounder: show it an image once, ask for as many phrases as you like."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from xvlm.data.images import READABLE
from xvlm.data.processor import Processor
from xvlm.types import Grounded, Proposals, Texts


@runtime_checkable
class Method(Protocol):
    """A way of grounding: a task's box head, for one. Boxes are ``xyxy`` normalised to the image.

    ``encode`` gives what is kept of images, in whatever form ``ground`` wants it. Where a method chooses among proposed
    boxes, ``encode`` takes these too, :class:`xvlm.types.Proposals` for each image.
    """

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Any: ...

    def ground(self, texts: Texts, seen: Any, about: Tensor) -> list[Grounded]: ...


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
        self.seen: Any = None
        self.size: tuple[int, int] = (0, 0)

    @torch.no_grad()  # not inference mode: some methods need a gradient further on
    def set_image(self, image: Image.Image | Path | str, proposals: Proposals | None = None) -> None:
        """Encode an image; later questions are about it.

        Args:
            proposals: boxes to choose among, in pixels of this image, for a method that does.
        """
        if not isinstance(image, Image.Image):
            image = Image.open(image, formats=READABLE)
        image = image.convert("RGB")
        self.size = image.size
        pixel_values = self.processor.pixel_values(image)[None].to(self.method.device)
        self.seen = self.method.encode(pixel_values, *([] if proposals is None else [[proposals]]))

    def predict(self, phrase: str) -> Grounded:
        """Where the phrase is; boxes are ``xyxy`` in pixels of the image given."""
        return self.predict_all([phrase])[0]

    @torch.no_grad()
    def predict_all(self, phrases: Sequence[str]) -> list[Grounded]:
        """:meth:`predict` for many phrases in one pass.

        Raises:
            RuntimeError: no image yet.
            ValueError: a phrase without words, or one that is too long; names it.
        """
        if self.seen is None:
            raise RuntimeError("no image yet: call set_image first")
        if not phrases:
            return []
        for number, phrase in enumerate(phrases):
            if not self.processor.has_words(phrase):
                raise ValueError(f"phrase {number}, {phrase!r}: has no words")
            if not self.processor.fits(phrase):
                most = self.processor.config
                raise ValueError(
                    f"phrase {number}, {phrase!r}: too long; the processor keeps {most.max_words} words and "
                    f"{most.max_tokens} tokens"
                )
        about = torch.zeros(len(phrases), dtype=torch.long, device=self.method.device)
        texts = self.processor.texts(list(phrases)).to(self.method.device)
        found = [each.to("cpu") for each in self.method.ground(texts, self.seen, about)]
        scale = torch.tensor([self.size * 2], dtype=torch.float)
        return [
            replace(each, boxes_xyxy=each.boxes_xyxy * scale, phrase=phrase)
            for each, phrase in zip(found, phrases, strict=True)
        ]
