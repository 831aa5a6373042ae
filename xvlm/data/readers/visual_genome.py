"""Reads Visual Genome: photographs with labelled objects, attributes, described regions, questions and answers.

Files as published (Krishna et al. 2016, https://homes.cs.washington.edu/~ranjay/visualgenome), version 1.0 (entries
have ``id``) or 1.2 and 1.4 (``image_id``), with or without the version in the name (``objects_v1_2.json``); one of the
last four is needed::

    folder/image_data.json
    folder/VG_100K/ID.jpg and folder/VG_100K_2/ID.jpg    or both in folder/images/, or all in folder/images/
    folder/objects.json
    folder/attributes.json
    folder/region_descriptions.json
    folder/question_answers.json

Boxes are ``x y w h`` (objects) and ``x y width height`` (regions) in pixels. The files are held in memory, which takes
gigabytes with all four.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from xvlm.data.readers.entries import NAMED, Kind, Number, by_id, entry, load, only
from xvlm.data.readers.photographs import AllowMissing, Found, Photographs, Sample, corners, known_as, record
from xvlm.data.records import Box, Object, Question, Region

SOURCE = "visual_genome"
LICENCE = "annotations CC BY 4.0, photographs under their terms at Flickr"
ONE_ANSWER = 0.5  # weight of an answer that one annotator gave (the reference: dataset/vqa_dataset.py)

logger = logging.getLogger(__name__)

ImageId = Annotated[int, Field(validation_alias=AliasChoices("image_id", "id"))]


# Dataclasses with slots, not models: there are millions of them.
@dataclass(slots=True)
class Photograph:
    image_id: ImageId
    width: int
    height: int
    url: str = ""
    coco_id: int | None = None
    flickr_id: int | None = None


@dataclass(slots=True)
class Thing:
    object_id: Annotated[int, Field(validation_alias=AliasChoices("object_id", "id"))]
    x: Number
    y: Number
    w: Number
    h: Number
    names: list[str]
    attributes: list[str] | None = None


@dataclass(slots=True)
class Described:
    region_id: Annotated[int, Field(validation_alias=AliasChoices("region_id", "id"))]
    x: Number
    y: Number
    width: Number
    height: Number
    phrase: str


@dataclass(slots=True)
class Asked:
    qa_id: Annotated[int, Field(validation_alias=AliasChoices("qa_id", "id"))]
    question: str
    answer: str


@dataclass(slots=True)
class Objects:
    image_id: ImageId
    objects: list[Thing]


@dataclass(slots=True)
class Attributes:
    image_id: ImageId
    attributes: list[Thing]


@dataclass(slots=True)
class Regions:
    image_id: ImageId
    regions: list[Described]


@dataclass(slots=True)
class Questions:
    image_id: ImageId
    qas: list[Asked]


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order of ``image_data.json``.

    Boxes are cut off at the border of the image; boxes without area and empty texts are left out. An object has the
    first of its names and the attributes that ``attributes.json`` gives it. An answer is as written ("Green.") and has
    the weight 0.5, as in the reference. Annotations of images that ``image_data.json`` does not list are left out, and
    logged. ``same_as`` has COCO's id for the half of the photographs that COCO has too.

    Args:
        folder: see the module's docstring for the files in it.
        split: train; the data set has no other part.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no image_data.json, none of the annotations, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the entry and the field.
    """
    if split != "train":
        raise ValueError(f"{folder}: split {split!r}; Visual Genome is one set, train")
    listed_at = folder / "image_data.json"
    photographs = by_id(f"{listed_at}: ", load(list[Photograph], listed_at), "image_id")
    objects = {number: one.objects for number, one in _entries(Objects, folder, "objects").items()}
    attributes = {number: one.attributes for number, one in _entries(Attributes, folder, "attributes").items()}
    regions = {number: one.regions for number, one in _entries(Regions, folder, "region_descriptions").items()}
    questions = {number: one.qas for number, one in _entries(Questions, folder, "question_answers").items()}
    if not (objects or attributes or regions or questions):
        raise FileNotFoundError(
            f"{folder}: no annotations; expected objects.json, attributes.json, region_descriptions.json or "
            "question_answers.json"
        )
    annotated = objects.keys() | attributes.keys() | regions.keys() | questions.keys()
    if unlisted := annotated - photographs.keys():
        few = ", ".join(map(str, sorted(unlisted)[:NAMED]))
        logger.warning("%s does not list %d images that have annotations: %s", listed_at, len(unlisted), few)
    places = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images", "images2")
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for one in photographs.values():
            with entry():
                found = images.find(f"{listed_at.name} lists {one.image_id}", f"{one.image_id}.jpg")
                if found is None:
                    continue
                found = found.of_size(one.width, one.height)
                ids = {"coco": one.coco_id, "flickr": one.flickr_id}
                made = record(
                    f"{folder}: image {one.image_id}",
                    found,
                    id=str(one.image_id),
                    source=SOURCE,
                    objects=_objects(objects.get(one.image_id, []), attributes.get(one.image_id, []), found),
                    regions=_regions(regions.get(one.image_id, []), found),
                    questions=[
                        Question(
                            text=asked.question, answers={asked.answer: ONE_ANSWER}, kind="vg", id=str(asked.qa_id)
                        )
                        for asked in questions.get(one.image_id, [])
                        if asked.question and asked.answer
                    ],
                    licence=LICENCE,
                    credit=one.url,
                    same_as=known_as(one.url)
                    | {name: str(number) for name, number in ids.items() if number is not None},
                )
                yield made, found.image


def _entries(kind: type[Kind], folder: Path, name: str) -> dict[int, Kind]:
    path = only(folder, f"{name}.json", f"{name}_v*.json")
    return by_id(f"{path}: ", load(list[kind], path), "image_id") if path else {}


def _objects(plain: list[Thing], with_attributes: list[Thing], found: Found) -> list[Object]:
    attributes = {thing.object_id: thing for thing in with_attributes}
    known = {thing.object_id for thing in plain}
    objects = []
    for thing in [*plain, *(thing for thing in with_attributes if thing.object_id not in known)]:
        box = _box((thing.x, thing.y, thing.w, thing.h), found)
        label = next((name.strip() for name in thing.names if name.strip()), "")
        if box is not None and label:
            same = attributes.get(thing.object_id)
            adjectives = same.attributes or [] if same else []
            said = [adjective.strip() for adjective in adjectives if adjective.strip()]
            objects.append(Object(box_xyxy=box, label=label, attributes=said))
    return objects


def _regions(described: list[Described], found: Found) -> list[Region]:
    regions = []
    for one in described:
        box, phrase = _box((one.x, one.y, one.width, one.height), found), " ".join(one.phrase.split())
        if box is not None and phrase:
            regions.append(Region(box_xyxy=box, descriptions=[phrase]))
    return regions


def _box(box_xywh: Box, found: Found) -> Box | None:
    return found.inside(corners(box_xywh))
