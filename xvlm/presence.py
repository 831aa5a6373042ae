"""Is what a phrase says in the image at all: a probability, calibrated on phrases of which that is known.

A box head answers every phrase with a box. The matching head says whether the phrase fits the image, and, asked again
about the box alone, whether it fits what was found. Two weights and a bias, fitted on held-out phrases with and without
a target, make a probability of these (Platt scaling), a threshold makes a verdict. They are stored with the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from xvlm import metrics
from xvlm.data.processor import Processor
from xvlm.data.reading import records
from xvlm.data.shards import Shards
from xvlm.grounder import Method
from xvlm.models.attached import Attached
from xvlm.models.vision import regions_in_pixels
from xvlm.models.xvlm import XVLM
from xvlm.types import Concepts, Grounded, Texts


class Presence(Attached):
    """Weights of the two log-odds, their bias, and the probability from which on a phrase counts as present."""

    FILE = "presence.json"
    image: float
    region: float
    bias: float
    threshold: float

    def probability(self, odds: Float[Tensor, "phrase 2"]) -> Float[Tensor, "phrase"]:
        return (odds @ odds.new_tensor([self.image, self.region]) + self.bias).sigmoid()


@torch.no_grad()
def log_odds(
    model: XVLM,
    texts: Texts,
    concepts: Concepts,
    about: Int[Tensor, "phrase"],
    boxes_xyxy: Float[Tensor, "phrase 4"],
) -> Float[Tensor, "phrase 2"]:
    """How much each phrase matches its image, and the box found for it in that image: log-odds of the matching head.

    Args:
        concepts: encoded images; ``about`` says which of them each phrase is about.
        boxes_xyxy: normalised to the image.
    """
    height, width = model.config.vision.image_size
    pixels = boxes_xyxy.double() * boxes_xyxy.new_tensor([width, height] * 2)
    both = model.vision.with_regions(concepts, regions_in_pixels(pixels, about, (height, width)))
    words = model.encode_text(texts)
    phrase = torch.arange(len(about), device=about.device)
    of, looked_at = phrase.repeat(2), torch.cat([about, len(concepts.row) + phrase])
    logits = model.match(model.fuse(words, both, looked_at, of, words.beginnings[of])).float()
    return torch.stack((logits[:, 1] - logits[:, 0]).chunk(2), 1)


class WithPresence:
    """A method of grounding whose answers say how likely it is that there is anything to find."""

    def __init__(self, method: Method, model: XVLM, presence: Presence):
        self.method, self.model, self.presence = method, model, presence
        model.eval()

    @property
    def device(self) -> torch.device:
        return self.method.device

    def encode(self, images: Tensor) -> Concepts:
        return self.method.encode(images)

    def ground(self, texts: Texts, seen: Concepts, about: Int[Tensor, "phrase"]) -> list[Grounded]:
        found = self.method.ground(texts, seen, about)
        best = torch.stack([each.boxes_xyxy[0] for each in found])
        probability = self.presence.probability(log_odds(self.model, texts, seen, about, best))
        return [replace(each, presence=p) for each, p in zip(found, probability.tolist(), strict=True)]


def fit(odds: Float[Tensor, "phrase 2"], present: Bool[Tensor, "phrase"]) -> Presence:
    """Logistic regression, and the threshold with the best mean of the accuracies on present and on absent phrases.

    Raises:
        ValueError: phrases of one kind only.
    """
    if present.all() or not present.any():
        raise ValueError(
            f"presence: {int(present.sum())} of {len(present)} phrases have a target; both kinds are needed"
        )
    odds, truth = odds.double(), present.double()
    scale = odds.square().mean(0).sqrt().clamp(min=1e-6)
    weights = torch.zeros(3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (odds / scale) @ weights[:2] + weights[2]
        # The little on the weights keeps them finite where the phrases can be told apart without an error.
        total = F.binary_cross_entropy_with_logits(logits, truth) + 1e-5 * weights[:2].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    image, region, bias = (weights.detach() / F.pad(scale, (0, 1), value=1.0)).tolist()
    fitted = Presence(image=image, region=region, bias=bias, threshold=0.5)
    return fitted.model_copy(update={"threshold": _threshold(fitted.probability(odds), present)})


def _threshold(probability: Float[Tensor, "phrase"], present: Bool[Tensor, "phrase"]) -> float:
    """Between two neighbouring probabilities, where the mean of both accuracies is best."""
    sorted_, order = probability.sort()
    truth = present[order].double()
    # Calling the first k absent: absent ones among them are right, and so are present ones behind them.
    right_absent = F.pad((1 - truth).cumsum(0), (1, 0)) / (1 - truth).sum()
    right_present = 1 - F.pad(truth.cumsum(0), (1, 0)) / truth.sum()
    edges = torch.cat([sorted_[:1] * 0, (sorted_[1:] + sorted_[:-1]) / 2, sorted_[-1:] * 0 + 1])
    return float(edges[(right_absent + right_present).argmax()])


def gather(
    method: Method, model: XVLM, processor: Processor, shards: Shards, indices: Sequence[int], batch_size: int = 32
) -> tuple[Float[Tensor, "phrase 2"], Bool[Tensor, "phrase"]]:
    """Log-odds of every referring expression of some records, and whether it has a target."""
    odds, present = [], []
    for some, images in tqdm(records(shards, processor, indices, batch_size), desc="asking", unit="batch", leave=False):
        asked = [(i, said) for i, record in enumerate(some) for said in record.expressions]
        asked = [(i, said) for i, said in asked if processor.has_words(said.text)]
        if not asked:
            continue
        about = torch.tensor([i for i, _ in asked], device=method.device)
        texts = processor.texts([said.text for _, said in asked]).to(method.device)
        with torch.no_grad():
            concepts: Any = method.encode(images.to(method.device))
            best = torch.stack([found.boxes_xyxy[0] for found in method.ground(texts, concepts, about)])
        odds.append(log_odds(model, texts, concepts, about, best).cpu())
        present += [said.box_xyxy is not None for _, said in asked]
    return torch.cat(odds) if odds else torch.zeros(0, 2), torch.tensor(present, dtype=torch.bool)


def numbers(presence: Presence, odds: Float[Tensor, "phrase 2"], present: Bool[Tensor, "phrase"]) -> dict[str, float]:
    """N-acc, T-acc and calibration error; see :func:`xvlm.metrics.presence`."""
    return metrics.presence(presence.probability(odds), present, presence.threshold)
