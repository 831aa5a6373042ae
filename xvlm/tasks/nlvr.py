"""NLVR2: is a statement true of two images? And text assignment, X-VLM's pre-training for it.

Both need a model whose ``text.looks`` is 2: its cross layers look at the first and the second image in turn.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Movable, Texts


@dataclass(frozen=True)
class Statements(Movable):
    """Statements about two images each; ``about`` are rows of ``images``, first image first."""

    images: Float[Tensor, "image 3 height width"]
    texts: Texts
    about: Int[Tensor, "text 2"]
    true: Bool[Tensor, "text"]
    ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class NlvrConfig(Configured):
    """How assignment draws its wrong images; the statements' own task has nothing to choose."""

    temperature: float = 0.07  # of the similarity between images by which they are drawn
    neither: float = 1 / 3  # share of texts that are shown two wrong images


class Task(nn.Module):
    """True or false, cross-entropy (X-VLM section 4.2; reference ``models/model_nlvr.py``).

    The model needs the head ``truth_head``.
    """

    def __init__(self, config: NlvrConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batches: dict[str, Statements]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/truth``."""
        return {
            f"{stream}/truth": losses.classification(self.judge(batch), batch.true.long())
            for stream, batch in batches.items()
        }

    @torch.inference_mode()
    def predict(self, batch: Statements) -> Float[Tensor, "text"]:
        """Probability that each statement is true of its images."""
        return self.judge(batch).float().softmax(-1)[:, 1]

    def judge(self, batch: Statements) -> Float[Tensor, "text 2"]:
        words = self.model.encode_text(batch.texts)
        concepts = self.model.encode_image(batch.images)
        return self.model.judge(self.model.fuse(words, concepts, batch.about, only=words.beginnings))


class Assignment(nn.Module):
    """Which of two images is a caption about, the first, the second or neither? (reference
    ``models/model_nlvr_pretrain.py``, after ALBEF)

    The wrong images come from the same batch, similar ones more often. The model needs the heads ``image_projection``
    (which only tells how similar images are and does not learn) and ``assignment_head``.
    """

    def __init__(self, config: NlvrConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model
        model.image_projection.requires_grad_(False)

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/assignment``.

        Raises:
            ValueError: a batch of fewer than three images.
        """
        named = {}
        for stream, batch in batches.items():
            concepts, own = self.model.encode_image(batch.images), batch.regions.image
            others = draw_others(self.model.embed_image(concepts), own, self.config.temperature)
            about, answer = arrange(own, others, torch.rand(len(own), 2), self.config.neither)
            logits = self.assign(batch.texts, concepts, about)
            named[f"{stream}/assignment"] = losses.classification(logits, answer)
        return named

    @torch.inference_mode()
    def predict(self, batch: Statements) -> Float[Tensor, "text 3"]:
        """Probabilities that each text is about its first image, its second, neither."""
        return self.assign(batch.texts, self.model.encode_image(batch.images), batch.about).float().softmax(-1)

    def assign(self, texts: Texts, concepts: Concepts, about: Int[Tensor, "text 2"]) -> Float[Tensor, "text 3"]:
        words = self.model.encode_text(texts)
        return self.model.assign(self.model.fuse(words, concepts, about, only=words.beginnings))


@torch.no_grad()
def draw_others(
    image: Float[Tensor, "image dim"], own: Int[Tensor, "text"], temperature: float
) -> Int[Tensor, "text 2"]:
    """Two different images for each text, neither its own, with the softmax of their similarity to its own.

    1e-5 is added to every weight, as hard negatives have it: the reference adds nothing and fails where all but one
    of the weights vanish.

    Raises:
        ValueError: fewer than three images.
    """
    if len(image) < 3:
        raise ValueError(f"text assignment draws two wrong images, but the batch has {len(image)} images")
    similarity = losses.similarity(image, image, torch.tensor(temperature, device=image.device))
    weights = (similarity.softmax(1) + 1e-5).fill_diagonal_(0)
    return torch.multinomial(weights[own], 2)


def arrange(
    own: Int[Tensor, "text"], others: Int[Tensor, "text 2"], chance: Float[Tensor, "text 2"], neither: float
) -> tuple[Int[Tensor, "text 2"], Int[Tensor, "text"]]:
    """The two images each text is shown, and which of them is its own: the first (0), the second (1) or neither (2).

    Args:
        chance: uniform in [0, 1): up to ``neither``, the first number puts two others there; above one half, the second
            puts the text's own image first.
    """
    hidden, first = (chance[:, 0] <= neither).to(own.device), (chance[:, 1] > 0.5).to(own.device)
    answer = torch.where(hidden, 2, torch.where(first, 0, 1))
    pairs = torch.stack([torch.stack([own, others[:, 0]], 1), torch.stack([others[:, 0], own], 1), others])
    return pairs[answer, torch.arange(len(own), device=own.device)], answer
