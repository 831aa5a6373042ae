"""How a report looks at the answers of each task: what each is worth, which slices it is in, and its picture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from PIL import Image

from xvlm import boxes, evaluate, probe, report, viz
from xvlm.data.images import decode_image
from xvlm.data.shards import Shards
from xvlm.metrics import captions, slices
from xvlm.tasks import captioning, nlvr, vqa

Picture = tuple[Image.Image, str]  # with its caption
SHEET = {"width": 230, "letters": 22}  # of two pictures side by side, legible at half their size


@dataclass(frozen=True)
class Example:
    """An answer whose truth is known."""

    row: Any
    texts: Sequence[str]  # whose words say what it is about
    merit: float  # its part in the task's headline: the mean over all is that number
    score: float  # orders answers from the worst to the best, finer than merit
    slices: Sequence[str] = ()  # others than those of its words


@dataclass(frozen=True)
class View:
    """A task's rows as a report looks at them."""

    headline: str  # the one of its numbers that slices are given of
    examples: Callable[[Sequence[Any]], list[Example]]
    draw: Callable[[Any, Sequence[Any], Shards], Picture]  # a row, among all of its split


def by_slice(view: View, rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """The headline of each slice and how many examples are in it, by the slice's name; those of all first."""
    parts: dict[str, list[float]] = {}
    for example in view.examples(rows):
        kinds = {kind for text in example.texts for kind in slices.kinds(text)}
        for name in ("all", *(f"words: {kind}" for kind in kinds), *example.slices):
            parts.setdefault(name, []).append(example.merit)
    order = ["all", *(f"words: {kind}" for kind in (*slices.RULES, slices.OTHER))]
    named = [*filter(parts.__contains__, order), *sorted(parts.keys() - set(order))]
    return {name: {"examples": len(parts[name]), view.headline: _mean(parts[name])} for name in named}


def galleries(view: View, rows: Sequence[Any], shards: Shards, title: str, count: int = 6) -> list[report.Gallery]:
    """The best, the worst and some examples drawn; which of equal ones is left to chance, the same each time."""
    examples = view.examples(rows)
    Random(0).shuffle(examples)
    some, ordered = examples[-count:], sorted(examples, key=lambda example: example.score, reverse=True)
    chosen = {"the best": ordered[:count], "the worst": ordered[count:][: -count - 1 : -1], "drawn by lot": some}
    return [
        report.Gallery(f"{title}: {name}", [view.draw(example.row, rows, shards) for example in part])
        for name, part in chosen.items()
        if part
    ]


def picture_of(shards: Shards, record: str) -> Image.Image:
    return decode_image(shards.read(shards.find(record))[1])


def plain(image: Image.Image) -> Image.Image:
    return viz.draw(image, torch.zeros(0, 4))  # enlarged like those with boxes


# Grounding.


def phrases(rows: Sequence[evaluate.Query]) -> list[Example]:
    found = []
    for row in rows:
        if row.boxes_xyxy:
            area = boxes.area(row.merged_xyxy)
            size = next(name for name, (least, most) in evaluate.SIZES.items() if least <= area < most)
            named = (f"object: {size}", *(f"tag: {tag}" for tag in row.tags))
            found.append(Example(row, [row.text], float(row.iou >= 0.5), row.iou, named))
    return found


def draw_phrase(row: evaluate.Query, _rows: Sequence[evaluate.Query], shards: Shards) -> Picture:
    return probe.drawn(shards, row)


# Retrieval. Rows know images and texts by their numbers; a row that asks about one has its name.


def texts_of(rows: Sequence[evaluate.Ranked]) -> list[str]:
    return [row.query for row in rows if row.direction == "text_to_image"]


def asked_texts(rows: Sequence[evaluate.Ranked]) -> list[Example]:
    asked = [row for row in rows if row.direction == "text_to_image"]
    return [Example(row, [row.query], float(row.rank <= 1), -row.rank) for row in asked]


def asked_images(rows: Sequence[evaluate.Ranked]) -> list[Example]:
    """Images are sliced by the words of their own texts."""
    texts = texts_of(rows)
    asked = [row for row in rows if row.direction == "image_to_text"]
    return [Example(row, [texts[text] for text in row.right], float(row.rank <= 1), -row.rank) for row in asked]


def draw_images(row: evaluate.Ranked, rows: Sequence[evaluate.Ranked], shards: Shards, most: int = 4) -> Picture:
    """A text's first images, the right one marked."""
    texts = [each for each in rows if each.direction == "text_to_image"]
    name = {texts[each.right[0]].right[0]: each.query for each in rows if each.direction == "image_to_text"}
    found = [image for image in row.candidates if image in name][:most]
    marks = [f"{n}{' right' if image in row.right else ''}" for n, image in enumerate(found, 1)]
    sheet = viz.contact_sheet([picture_of(shards, name[image]) for image in found], marks, columns=2, **SHEET)
    return sheet, f"{row.query}\n{place(row)}"


def draw_texts(row: evaluate.Ranked, rows: Sequence[evaluate.Ranked], shards: Shards, most: int = 4) -> Picture:
    """An image's first texts, the right ones marked."""
    texts = texts_of(rows)
    found = [f"{n}{' right' if text in row.right else ''}: {texts[text]}" for n, text in enumerate(row.candidates, 1)]
    return plain(picture_of(shards, row.query)), "\n".join([*found[:most], place(row)])


def place(row: evaluate.Ranked) -> str:
    if row.rank == float("inf"):
        return "nothing right is among the candidates"
    return f"{'the right one' if len(row.right) == 1 else 'the first right one'} is number {row.rank:g}"


# VQA.


def questions(rows: Sequence[vqa.Answered]) -> list[Example]:
    known = [row for row in rows if row.given]
    return [
        Example(row, [row.question], row.accuracy, row.accuracy, [f"kind: {row.kind}"] if row.kind else [])
        for row in known
    ]


def draw_question(row: vqa.Answered, _rows: Sequence[vqa.Answered], shards: Shards) -> Picture:
    truth = ", ".join(sorted(row.given, key=row.given.get, reverse=True))
    caption = f"{row.question}\nanswer: {row.answer}\ntruth: {truth}"
    return plain(picture_of(shards, row.record)), caption


# Captioning.


def written(rows: Sequence[captioning.Captioned]) -> list[Example]:
    known = [row for row in rows if row.references]
    if not known:
        return []
    cider = captions.cider_d(*captioning.in_words(known))
    return [Example(row, row.references, score, score) for row, score in zip(known, cider, strict=True)]


def draw_caption(row: captioning.Captioned, _rows: Sequence[captioning.Captioned], shards: Shards) -> Picture:
    truth = "\n".join(f"- {text}" for text in row.references)
    return plain(picture_of(shards, row.record)), f"{row.caption}\ntruth:\n{truth}"


# NLVR2.


def statements(rows: Sequence[nlvr.Judged]) -> list[Example]:
    return [
        Example(row, [row.text], float(row.right), row.probability if row.label else 1 - row.probability)
        for row in rows
    ]


def draw_statement(row: nlvr.Judged, _rows: Sequence[nlvr.Judged], shards: Shards) -> Picture:
    both = [picture_of(shards, row.record), picture_of(shards, row.other)]
    said = f"{row.text}\nanswer: {row.probability > 0.5} ({row.probability:.2f}), truth: {row.label}"
    return viz.contact_sheet(both, ["left", "right"], columns=2, **SHEET), said


GROUNDING = View("acc@0.5", phrases, draw_phrase)
TEXT_TO_IMAGE = View("text_to_image_r1", asked_texts, draw_images)
IMAGE_TO_TEXT = View("image_to_text_r1", asked_images, draw_texts)
VQA = View("accuracy", questions, draw_question)
CAPTIONING = View("CIDEr", written, draw_caption)
NLVR = View("accuracy", statements, draw_statement)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
