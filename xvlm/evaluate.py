"""Evaluation protocols for any model with the three verbs: retrieval, grounding, telling regions apart.

Each example is scored exactly once whatever the number of processes: pairs, phrases and regions are split over ranks
and the results are gathered (a retrieval gallery is encoded by every rank; scoring its pairs is what costs). Every
protocol returns the rows that its numbers are computed from, so that they can be kept and scored again. Texts without a
word take no part; they are counted and logged.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from xvlm import boxes, distributed, metrics
from xvlm.data.processor import Processor
from xvlm.data.reading import records
from xvlm.data.records import Box, Record, Region
from xvlm.data.shards import Shards
from xvlm.grounder import Method
from xvlm.models.vision import regions_in_pixels
from xvlm.models.xvlm import XVLM
from xvlm.types import Concepts, Grounded, Proposals, Words

T = TypeVar("T")
Numbers = dict[str, float]
# Numbers of records in their shards, the records and their images -> what is predicted about each record.
Predict = Callable[[Sequence[int], Sequence[Record], Float[Tensor, "image 3 height width"]], Sequence[Sequence[T]]]

logger = logging.getLogger(__name__)


@torch.no_grad()  # not inference mode: some methods need a gradient further on
def each_once(
    predict: Predict[T], processor: Processor, shards: Shards, indices: Sequence[int], *, batch_size: int
) -> list[T]:
    """What is predicted about each of some records, in their order; the processes share the work, all have the rows."""
    world = distributed.world()
    mine = list(indices)[world.rank :: world.size]
    position = {shards.key(i): i for i in mine}
    rows: list[tuple[int, Sequence[T]]] = []
    for some, images in records(shards, processor, mine, batch_size):
        numbers = [position[record.id] for record in some]
        rows += zip(numbers, predict(numbers, some, images), strict=True)
    everyone = [row for part in distributed.gather_objects(rows) for row in part]
    place = {i: n for n, i in enumerate(indices)}
    return [row for _, answers in sorted(everyone, key=lambda row: place[row[0]]) for row in answers]


# Retrieval.


@dataclass(frozen=True)
class Ranked:
    """A retrieval query and its best candidates by matching score, best first; images and texts by their numbers."""

    direction: Literal["image_to_text", "text_to_image"]
    query: str  # id of the image's record, or the text
    right: tuple[int, ...]
    candidates: tuple[int, ...]
    scores: tuple[float, ...]
    rank_by_contrast: float  # of the best right one among all, by similarity alone

    @property
    def rank(self) -> float:
        """Of the best right candidate, counted as in :func:`xvlm.metrics.ranks`."""
        scores, right = torch.tensor([self.scores]), torch.tensor([[c in self.right for c in self.candidates]])
        return metrics.ranks(scores, right).item()


@dataclass(frozen=True)
class Retrieved:
    """``scores`` are -inf for pairs that were no candidates; ``text_image`` is the row of each text's own image."""

    numbers: Numbers
    rows: list[Ranked]
    scores: Float[Tensor, "image text"]
    texts: list[str]
    text_image: Int[Tensor, "text"]
    indices: list[int]  # of the images, in their shards


@torch.inference_mode()
def retrieval(
    model: XVLM,
    processor: Processor,
    shards: Shards,
    indices: Sequence[int],
    *,
    captions: int = 1,
    top_k: int = 16,
    batch_size: int = 32,
) -> Retrieved:
    """Image-text retrieval as X-VLM reports it: candidates by contrast, re-ranked by the matching head.

    An image ranks its ``top_k`` most similar texts, a text its ``top_k`` most similar images; everything else ranks
    below (reference ``Retrieval.py:evaluation``). A pair that both ask for is fused and scored once.

    Args:
        indices: the gallery, positions in ``shards``.
        captions: how many of each record's captions take part.

    Raises:
        ValueError: there is no caption.
    """
    position = {shards.key(i): i for i in indices}
    patches, pooled, texts, text_image, gallery_indices = [], [], [], [], []
    for some, images in records(shards, processor, indices, batch_size):
        concepts = model.encode_image(images.to(_device(model)))
        patches.append(concepts.patches)
        pooled.append(concepts.pooled)
        for record in some:
            told = _with_words(processor, record.captions[:captions], str, record)
            texts += told
            text_image += [len(gallery_indices)] * len(told)
            gallery_indices.append(position[record.id])
    if not texts:
        raise ValueError("retrieval: none of the records has a caption")
    gallery = _whole_images(torch.cat(patches), torch.cat(pooled), model.vision.grid)
    words = concatenate([_encode_texts(model, processor, part) for part in _chunks(texts, 256)])
    similarity, by_image, by_text = rank(model, gallery, words, top_k)
    of = torch.tensor(text_image)
    numbers = {}
    for direction, scores in (("image_to_text", by_image), ("text_to_image", by_text)):
        ranked = metrics.recall_at_k(scores, of)
        numbers |= {name: value for name, value in ranked.items() if name.startswith(direction)}
    contrast = metrics.recall_at_k(similarity, of)
    numbers |= {f"{name}_without_reranking": value for name, value in contrast.items()}
    own = of == torch.arange(len(gallery_indices))[:, None]
    names = [shards.key(i) for i in gallery_indices]
    rows = _ranked("image_to_text", names, by_image, similarity, own)
    rows += _ranked("text_to_image", texts, by_text.T, similarity.T, own.T)
    return Retrieved(numbers, rows, torch.maximum(by_image, by_text), texts, of, gallery_indices)


KEPT = 100  # candidates of a query that its row keeps


def _ranked(
    direction: Literal["image_to_text", "text_to_image"],
    queries: Sequence[str],
    scores: Float[Tensor, "query candidate"],
    similarity: Float[Tensor, "query candidate"],
    own: Bool[Tensor, "query candidate"],
) -> list[Ranked]:
    best = scores.sort(dim=1, descending=True, stable=True)
    found = (best.values > -torch.inf).sum(1).clamp(max=KEPT).tolist()
    rows = []
    for q, rank in enumerate(metrics.ranks(similarity, own).tolist()):
        candidates, values = best.indices[q, : found[q]].tolist(), best.values[q, : found[q]].tolist()
        right = tuple(own[q].nonzero()[:, 0].tolist())
        if right:  # an image without a text is no query
            rows.append(Ranked(direction, queries[q], right, tuple(candidates), tuple(values), rank))
    return rows


def retrieval_numbers(rows: Sequence[Ranked], ks: Sequence[int] = (1, 5, 10)) -> Numbers:
    """R@k in both directions, re-ranked and by contrast alone, and the mean of the re-ranked ones (X-VLM's r_mean)."""
    numbers = {}
    for suffix, rank_of in (("", lambda row: row.rank), ("_without_reranking", lambda row: row.rank_by_contrast)):
        for direction in ("image_to_text", "text_to_image"):
            ranks = [rank_of(row) for row in rows if row.direction == direction]
            numbers |= {f"{direction}_r{k}{suffix}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
        if not suffix:
            numbers["r_mean"] = sum(numbers.values()) / len(numbers)
    return numbers


def retrieval_chance(rows: Sequence[Ranked], ks: Sequence[int] = (1, 5, 10)) -> Numbers:
    """What a random order of the gallery gives."""
    per_image = [len(row.right) for row in rows if row.direction == "image_to_text"]
    images, texts = len(per_image), sum(per_image)
    numbers = {f"text_to_image_r{k}": min(1.0, k / images) for k in ks}
    for k in ks:
        missed = [math.prod(max(0, texts - own - i) / (texts - i) for i in range(min(k, texts))) for own in per_image]
        numbers[f"image_to_text_r{k}"] = 1 - sum(missed) / images
    return numbers


@torch.inference_mode()
def rank(
    model: XVLM, gallery: Concepts, words: Words, top_k: int
) -> tuple[Float[Tensor, "image text"], Float[Tensor, "image text"], Float[Tensor, "image text"]]:
    """Every image of a gallery against every text, in two steps.

    Returns:
        The similarities; the matching logits of each image's ``top_k`` most similar texts, -inf elsewhere; those of
        each text's ``top_k`` most similar images, -inf elsewhere. On the CPU.
    """
    similarity = (model.embed_image(gallery) @ model.embed_text(words).T).float()
    by_image, by_text = (
        torch.zeros_like(similarity, dtype=torch.bool).scatter_(
            dim, similarity.topk(min(top_k, similarity.shape[dim]), dim).indices, True
        )
        for dim in (1, 0)
    )
    scores = _rerank(model, gallery, words, by_image | by_text)
    return similarity.cpu(), *(scores.masked_fill(~each.cpu(), -torch.inf) for each in (by_image, by_text))


def _whole_images(patches: Float[Tensor, "image patch dim"], pooled: Tensor, grid: tuple[int, int]) -> Concepts:
    row = torch.arange(len(patches), device=patches.device)
    return Concepts(patches, pooled, row, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device), grid)


def _rerank(
    model: XVLM, gallery: Concepts, words: Words, candidate: Bool[Tensor, "image text"], images_at_once: int = 8
) -> Float[Tensor, "image text"]:
    """Matching logits of the candidate pairs, -inf elsewhere; by blocks of images, whose keys all their texts share."""
    world = distributed.world()
    blocks = list(_chunks(range(len(candidate)), images_at_once))[world.rank :: world.size]
    scored = []
    for block in tqdm(blocks, desc="re-ranking", leave=False, disable=world.rank != 0):
        image, text = candidate[block[0] : block[-1] + 1].nonzero().unbind(1)
        part = _whole_images(gallery.patches[block], gallery.pooled[block], gallery.grid)
        for i, t in zip(image.split(512), text.split(512), strict=True):
            logits = _match(model, words.take(t), part, i)
            scored.append(((i + block[0]).cpu(), t.cpu(), logits.cpu()))
    scores = torch.full(candidate.shape, float("-inf"))
    for image, text, logits in (row for rows in distributed.gather_objects(scored) for row in rows):
        scores[image, text] = logits
    return scores


# Grounding.


@dataclass(frozen=True)
class Query:
    """A phrase about an image and the boxes (``xyxy``, pixels) it names, none where nothing in the image is meant.

    Once answered, ``predicted_xyxy`` is the box, ``proposals_xyxy`` those it was chosen from, ``presence`` how likely
    there is anything to find and ``threshold`` from where on that is said. A method that shows where it looked has
    ``pointed`` and ``energy``: :func:`xvlm.metrics.pointing` and :func:`xvlm.metrics.energy_in_box`.
    """

    index: int  # of the record in its shards
    text: str
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]
    tags: tuple[str, ...] = ()
    predicted_xyxy: tuple[float, float, float, float] | None = None
    presence: float | None = None
    record: str = ""
    threshold: float | None = None
    proposals_xyxy: tuple[tuple[float, float, float, float], ...] = ()
    pointed: float | None = None
    energy: float | None = None

    @property
    def said(self) -> bool:
        """Whether the box counts as an answer; without a threshold it always does."""
        return self.threshold is None or self.presence >= self.threshold

    @property
    def iou(self) -> float:
        """Overlap of the predicted box with the box around all the true ones (the merged box); 0 without these."""
        if not self.boxes_xyxy:
            return 0.0
        return float(boxes.iou(torch.tensor(self.predicted_xyxy), self.merged_xyxy))

    @property
    def merged_xyxy(self) -> Float[Tensor, "4"]:
        return boxes.merge(torch.tensor(self.boxes_xyxy))


def grounding(
    method: Method,
    processor: Processor,
    shards: Shards,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    proposals: Callable[[Record], Proposals] | None = None,
    absent: bool = False,
    threshold: float | None = None,
) -> list[Query]:
    """Ask for every phrase of every record (see :func:`queries`); the first box of an answer counts.

    Args:
        proposals: of a record, for a method that chooses among them.
        absent: ask for expressions without a box, too.
        threshold: of the method's presence, from which on it says that there is something to find.
    """

    def predict(
        numbers: Sequence[int], some: Sequence[Record], images: Float[Tensor, "image 3 height width"]
    ) -> list[list[Query]]:
        proposed = [proposals(record) for record in some] if proposals else []
        chosen_from = [tuple(map(tuple, each.boxes_xyxy.tolist())) for each in proposed] or [()] * len(some)
        concepts = method.encode(images.to(method.device), *([proposed] if proposals else []))
        asked = [
            (i, query)
            for i, record in enumerate(some)
            for query in _with_words(processor, queries(record, numbers[i]), lambda query: query.text, record)
            if absent or query.boxes_xyxy
        ]
        answered: list[list[Query]] = [[] for _ in some]
        for part in _chunks(asked, 256):
            about = torch.tensor([i for i, _ in part], device=method.device)
            texts = processor.texts([query.text for _, query in part]).to(method.device)
            for (i, query), found in zip(part, method.ground(texts, concepts, about), strict=True):
                answer = _answer(query, found.to("cpu"), torch.tensor([some[i].width, some[i].height] * 2).float())
                answered[i].append(replace(answer, threshold=threshold, proposals_xyxy=chosen_from[i]))
        return answered

    return each_once(predict, processor, shards, indices, batch_size=batch_size)


def _answer(query: Query, found: Grounded, size: Float[Tensor, "4"]) -> Query:
    """The query with what was found; ``size`` is the image's width and height, twice."""
    box = found.boxes_xyxy[0] * size
    query = replace(query, predicted_xyxy=tuple(box.tolist()), presence=found.presence)
    if found.heat is None or not query.boxes_xyxy:
        return query
    true = query.merged_xyxy / size
    return replace(query, pointed=metrics.pointing(found.heat, true), energy=metrics.energy_in_box(found.heat, true))


def queries(record: Record, index: int) -> Iterator[Query]:
    """A record's referring expressions; without any, its caption phrases with boxes; without these, the first
    descriptions that only one region has; without these too, the labels that only one object has."""
    for said in record.expressions:
        named = said.boxes_xyxy or ([] if said.box_xyxy is None else [said.box_xyxy])
        yield Query(index, said.text, tuple(named), tuple(said.tags), record=record.id)
    if not record.expressions:
        for phrase in record.phrases:
            if phrase.boxes_xyxy:
                text = record.captions[phrase.caption][phrase.start : phrase.end]
                yield Query(index, text, tuple(phrase.boxes_xyxy), record=record.id)
    for text, boxes_xyxy in _things(record).items():
        if len(boxes_xyxy) == 1:  # which of several would be right?
            yield Query(index, text, tuple(boxes_xyxy), record=record.id)


def left_out(shards: Shards, indices: Sequence[int]) -> int:
    """How many texts with a box :func:`queries` leaves out, since their image has them for other boxes too."""
    things = chain.from_iterable(_things(shards.read(i)[0]).values() for i in indices)
    return sum(len(boxes_xyxy) for boxes_xyxy in things if len(boxes_xyxy) > 1)


def _things(record: Record) -> dict[str, dict[Box, None]]:
    """The boxes of each description or label of a record that has neither expressions nor phrases, each box once."""
    if record.expressions or record.phrases:
        return {}
    named = [(region.descriptions[0], region.box_xyxy) for region in record.regions]
    found: dict[str, dict[Box, None]] = {}
    for text, box_xyxy in named or [(thing.label, thing.box_xyxy) for thing in record.objects]:
        found.setdefault(text, {})[box_xyxy] = None
    return found


def grounding_numbers(answered: Sequence[Query]) -> Numbers:
    """acc@0.5 against any of a phrase's boxes and against the box around them all, and the mean IoU with the latter."""
    predicted, merged = _boxes(answered)
    numbers = metrics.phrase_grounding(predicted, [torch.tensor(query.boxes_xyxy) for query in answered])
    return {**numbers, "mean_iou": metrics.mean_iou(predicted, merged), "phrases": len(answered)}


# COCO's areas in pixels: 32² and 96².
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}


def referring_numbers(answered: Sequence[Query]) -> Numbers:
    """Referring expressions: acc@0.5, 0.7 and 0.9, mean IoU (per phrase) and overall IoU (of summed areas); acc@0.5 of
    small, medium and large objects, by COCO's areas, and of every tag. Of methods that look: the pointing game, and how
    much of their heat is in the true box.

    The truth is the box around all of a phrase's boxes; an IoU equal to the threshold counts. Phrases without a target
    take no part in these; where there are any, the numbers of :func:`presence_numbers` join them.
    """
    there = [query for query in answered if query.boxes_xyxy]
    predicted, merged = _boxes(there)
    numbers = {f"acc@{t}": metrics.grounding_accuracy(predicted, merged, t) for t in (0.5, 0.7, 0.9)}
    numbers |= {"mean_iou": metrics.mean_iou(predicted, merged), "overall_iou": metrics.overall_iou(predicted, merged)}
    for name, of in (("pointing_game", "pointed"), ("energy_in_box", "energy")):
        values = [getattr(query, of) for query in there]
        if None not in values:
            numbers[name] = sum(values) / len(values)
    area = boxes.area(merged)
    parts = {f"acc@0.5 {size}": (area >= least) & (area < most) for size, (least, most) in SIZES.items()}
    for tag in sorted({tag for query in there for tag in query.tags}):
        parts[f"acc@0.5 tag: {tag}"] = torch.tensor([tag in query.tags for query in there])
    for name, part in parts.items():
        if part.any():
            numbers[name] = metrics.grounding_accuracy(predicted[part], merged[part])
    return numbers | (presence_numbers(answered) if len(there) < len(answered) else {})


def presence_numbers(answered: Sequence[Query]) -> Numbers:
    """Phrases with and without a target: :func:`xvlm.metrics.presence` and :func:`xvlm.metrics.generalized_grounding`.

    Where no threshold is known, every box counts as an answer, given with certainty.
    """
    sure = [1.0 if query.threshold is None else query.presence for query in answered]
    present = torch.tensor([bool(query.boxes_xyxy) for query in answered])
    numbers = metrics.presence(torch.tensor(sure), present, answered[0].threshold or 0.0)
    said = torch.tensor([query.said for query in answered])
    targets = [torch.tensor(query.boxes_xyxy).reshape(-1, 4) for query in answered]
    return numbers | metrics.generalized_grounding(
        torch.tensor([query.predicted_xyxy for query in answered]), said, targets
    )


def whole_images(answered: Sequence[Query], shards: Shards) -> list[Query]:
    """The same phrases answered with the whole image: what grounding is compared with."""
    sizes = {i: shards.read(i)[0] for i in {query.index for query in answered}}
    return [
        replace(
            _unseen(query), predicted_xyxy=(0.0, 0.0, float(sizes[query.index].width), float(sizes[query.index].height))
        )
        for query in answered
    ]


def random_proposals(answered: Sequence[Query], seed: int = 0) -> list[Query]:
    """The same phrases answered with any of the boxes there were to choose among; without boxes, as they were."""
    dice = Random(seed)
    return [
        replace(_unseen(query), predicted_xyxy=dice.choice(query.proposals_xyxy)) if query.proposals_xyxy else query
        for query in answered
    ]


def best_proposals(answered: Sequence[Query]) -> list[Query]:
    """The same phrases answered with the proposal that meets the truth best: what no choice can exceed."""
    return [
        max(
            (replace(query, predicted_xyxy=box) for box in query.proposals_xyxy), key=lambda one: one.iou, default=query
        )
        for query in answered
    ]


def _unseen(query: Query) -> Query:
    """Without what a method said of it beside the box."""
    return replace(query, presence=None, threshold=None, pointed=None, energy=None)


def _boxes(answered: Sequence[Query]) -> tuple[Float[Tensor, "query 4"], Float[Tensor, "query 4"]]:
    """Predicted boxes, and the boxes around all the true ones."""
    if not answered:
        raise ValueError(
            "nothing to score: no record has a box whose text it says once; texts without boxes are for retrieval and "
            "captioning"
        )
    predicted = torch.tensor([query.predicted_xyxy for query in answered])
    return predicted, torch.stack([query.merged_xyxy for query in answered])


# Telling the regions of one image apart.


@torch.inference_mode()
def region_matching(
    model: XVLM, processor: Processor, shards: Shards, indices: Sequence[int], *, batch_size: int = 16
) -> dict[str, float]:
    """Which of an image's region descriptions fits a region, and which region a description, by the matching head.

    A region is seen through its own patches only (its region tokens). One description per region takes part, images
    with fewer than two regions do not. Chance is one over the number of regions, averaged over the questions; where
    there is no question there are no numbers.
    """
    world = distributed.world()
    device, size = _device(model), model.config.vision.image_size
    tables: list[Tensor] = []
    for some, images in records(shards, processor, list(indices)[world.rank :: world.size], batch_size):
        boxed = [(i, region) for i, record in enumerate(some) for region in _told_apart(processor, record)]
        if not boxed:
            continue
        image = torch.tensor([i for i, _ in boxed])
        stored = torch.tensor([[some[i].width, some[i].height] * 2 for i, _ in boxed])
        within = torch.tensor([region.box_xyxy for _, region in boxed], dtype=torch.float64)
        regions = regions_in_pixels(within * torch.tensor([size[1], size[0]] * 2) / stored, image, size)
        concepts = model.encode_image(images.to(device), regions.to(device))
        words = _encode_texts(model, processor, [region.descriptions[0] for _, region in boxed])
        region, text = (image[:, None] == image[None]).nonzero().to(device).unbind(1)
        logits = _match(model, words.take(text), concepts, len(images) + region).cpu()
        counts = image.unique_consecutive(return_counts=True)[1].tolist()
        tables += [part.view(n, n) for part, n in zip(logits.split([n * n for n in counts]), counts, strict=True)]
    scores = [table for rows in distributed.gather_objects(tables) for table in rows]
    return metrics.choice_accuracy(scores) if scores else {}


def _told_apart(processor: Processor, record: Record) -> list[Region]:
    """An image's regions whose first descriptions differ; none where fewer than two are left."""
    named = _with_words(processor, record.regions, lambda region: region.descriptions[0], record)
    regions = list({region.descriptions[0].lower(): region for region in named}.values())
    return regions if len(regions) > 1 else []


# Shared.


def _with_words(processor: Processor, items: Iterable[T], text_of: Callable[[T], str], record: Record) -> list[T]:
    """The items whose text has a word; those left out are logged."""
    items = list(items)
    kept = [item for item in items if processor.has_words(text_of(item))]
    if len(kept) < len(items):
        logger.warning("record %s: left out %d texts without words", record.id, len(items) - len(kept))
    return kept


def _match(model: XVLM, words: Words, concepts: Concepts, about: Int[Tensor, "text"]) -> Float[Tensor, "text"]:
    """Matching logit of each text with a concept; only the [CLS] is carried through the last layer."""
    return model.match(model.fuse(words, concepts, about, only=words.beginnings))[:, 1].float()


def concatenate(words: Sequence[Words]) -> Words:
    """Texts of several encodings as one."""
    longest = max(part.mask.shape[1] for part in words)
    masks = [F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in words]
    return Words(torch.cat([part.states for part in words]), torch.cat(masks))


def _encode_texts(model: XVLM, processor: Processor, texts: Sequence[str]) -> Words:
    return model.encode_text(processor.texts(list(texts)).to(_device(model)))


def _device(model: XVLM) -> torch.device:
    return next(model.parameters()).device


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = list(items)
    for start in range(0, len(items), size):
        yield items[start : start + size]
