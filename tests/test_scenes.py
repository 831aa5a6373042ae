"""The generated world is deterministic, its boxes are exact and everything said about it is true.

Truth is checked by readers of the sentences written here, on words and coordinates alone.
"""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from xvlm.data.scene_language import COLOURS, HELD_OUT, NUMBERS, SHAPES, SIZES, TEXTURES, plural, relation_holds
from xvlm.data.scenes import SceneConfig, draw, object_masks, record, render, sample_scene, samples, vocabulary

CONFIG = SceneConfig()
COUNT = 60
KINDS = {word: kind for kind, words in enumerate((SIZES, COLOURS, TEXTURES, SHAPES)) for word in words}
SINGULAR = {plural(word): word for word in (*SHAPES, "object", "thing")}


@pytest.fixture(scope="module")
def world():
    """Scenes and records of all splits, (split, index) as keys."""
    keys = [*((split, i) for split in ("train", "val") for i in range(COUNT)), *(("test", i) for i in range(2 * COUNT))]
    scenes = {key: sample_scene(CONFIG, *key) for key in keys}
    return {key: (scene, record(scene)) for key, scene in scenes.items()}


def fitting(phrase: str, things: list) -> list[int]:
    """Objects that have every attribute word of a phrase in which nothing else is said."""
    words = [SINGULAR.get(word, word) for word in phrase.split()]
    said = {KINDS[word]: word for word in words if word in KINDS}
    return [i for i, thing in enumerate(things) if all(thing.attributes[kind] == word for kind, word in said.items())]


def mentioned(text: str) -> list[tuple]:
    """The (size, colour, texture, shape) of each object of a complete description, plain where no texture is said."""
    found = []
    parts = re.findall(r"\ban? (" + "|".join(SIZES) + r") ([a-z ]+?)\b(" + "|".join(SHAPES) + r")\b", text)
    for size, adjectives, shape in parts:
        colour, *texture = adjectives.split()
        found.append((size, colour, texture[0] if texture else "plain", shape))
    return found


def test_same_arguments_same_bytes():
    first, again = (list(samples(CONFIG, "val", 4, start=6)) for _ in range(2))
    assert first == again
    sample_scene.cache_clear()
    assert list(samples(CONFIG, "val", 4, start=6)) == first
    assert [r.id for r, _ in first] == ["val-000006", "val-000007", "val-000008", "val-000009"]


@pytest.mark.parametrize("other", [(SceneConfig(seed=1), "val", 6), (CONFIG, "train", 6), (CONFIG, "val", 7)])
def test_seed_split_and_index_change_the_scene(other):
    assert sample_scene(*other).layout != sample_scene(CONFIG, "val", 6).layout


def test_held_out_combinations_are_spread():
    shapes, colours = Counter(shape for shape, _ in HELD_OUT), Counter(colour for _, colour in HELD_OUT)
    assert len(HELD_OUT) == len(SHAPES) * len(COLOURS) // 10
    assert max(shapes.values()) == max(colours.values()) == 1
    assert set(shapes) <= set(SHAPES) and set(colours) <= set(COLOURS)


def test_held_out_combinations_are_drawn_in_odd_test_scenes_only(world):
    shares = []
    for (split, index), (scene, rec) in world.items():
        pairs = [(thing.attributes.shape, thing.attributes.colour) for thing in scene.layout.things]
        share = sum(pair in HELD_OUT for pair in pairs) / len(pairs)
        unseen = split == "test" and index % 2 == 1
        assert (share > 0) == unseen
        assert rec.tags == ["unseen" if unseen else "seen"]
        shares += [share] if unseen else []
    assert 0.4 < np.mean(shares) < 0.85


def test_held_out_combinations_are_not_named_where_they_are_not_drawn(world):
    pair = re.compile(r"\b(" + "|".join(COLOURS) + r")(?: (?:" + "|".join(TEXTURES) + r"))? (\w+)")
    named = Counter()
    for _, rec in world.values():
        texts = [*rec.captions, *(e.text for e in rec.expressions), *(q.text for q in rec.questions)]
        texts += [s.text for s in rec.statements]
        for colour, noun in itertools.chain.from_iterable(pair.findall(text) for text in texts):
            named[rec.tags[0]] += (SINGULAR.get(noun, noun), colour) in HELD_OUT
    assert named["seen"] == 0
    assert named["unseen"] > 0


def test_boxes_are_tight_around_visible_pixels():
    for size, index in itertools.product((64, 128, 200), range(6)):
        rendered = render(sample_scene(CONFIG, "train", index), size)
        assert rendered.image.shape == (size, size, 3) and rendered.image.dtype == np.uint8
        assert rendered.masks.sum(0).max() == 1
        for mask, (left, top, right, bottom) in zip(rendered.masks, rendered.boxes_xyxy, strict=True):
            ys, xs = np.nonzero(mask)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (left, top, right, bottom)


def test_masks_lie_on_the_objects_in_the_picture():
    seen = 0
    for index in range(10):
        scene = sample_scene(CONFIG, "train", index)
        image, masks = draw(scene, 96).astype(int), object_masks(scene, 96)
        for thing, mask in zip(scene.layout.things, masks, strict=True):
            if thing.attributes.texture == "plain":
                off = np.abs(image - np.array(thing.paint) * 255).max(-1)
                assert np.median(off[mask]) < 0.5 * np.median(off[~masks.any(0)])
                seen += 1
    assert seen > 5


def test_objects_stay_mostly_visible_and_sizes_apart():
    config = SceneConfig(max_overlap=0.2, max_objects=7)
    diameters = {size: [] for size in SIZES}
    for index in range(40):
        things = sample_scene(config, "train", index).layout.things
        shown = object_masks(sample_scene(config, "train", index), 128)
        for i, thing in enumerate(things):
            alone = object_masks(sample_alone(config, index, i), 128)[0]
            assert shown[i].sum() >= 0.75 * alone.sum()
            diameters[thing.attributes.size].append(2 * thing.radius)
    assert max(diameters["small"]) < min(diameters["medium"]) < max(diameters["medium"]) < min(diameters["large"])


def sample_alone(config: SceneConfig, index: int, which: int):
    """The scene with one of its objects only."""
    scene = sample_scene(config, "train", index)
    return replace(scene, layout=replace(scene.layout, things=(scene.layout.things[which],), covers={}))


def test_sizes_of_drawing_agree():
    for index in range(8):
        scene = sample_scene(CONFIG, "train", index)
        small, large = draw(scene, 64).astype(float), draw(scene, 256).astype(float)
        reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small - reduced).mean() < 2.0
        assert np.abs(small - reduced[:, ::-1]).mean() > 6.0


def test_sizes_of_background_agree():
    for index in range(8):
        scene = sample_scene(SceneConfig(clutter=1.0), "train", index)
        scene = replace(scene, layout=replace(scene.layout, things=(), covers={}))
        small, large = draw(scene, 96).astype(float), draw(scene, 384).astype(float)
        assert np.abs(small - large.reshape(96, 4, 96, 4, 3).mean((1, 3))).max() < 10


def test_clutter_is_drawn_and_can_be_left_out():
    calm, busy = (sample_scene(SceneConfig(clutter=amount), "train", 3).background for amount in (0.0, 1.0))
    assert not calm.strokes and calm.noise == 0 and busy.strokes and busy.noise > 0


def test_first_caption_is_complete(world):
    for scene, rec in world.values():
        assert 3 <= len(rec.captions) <= 5
        assert sorted(mentioned(rec.captions[0].replace("plain ", ""))) == sorted(
            t.attributes for t in scene.layout.things
        )
        assert len(rec.captions[0].split()) <= (30 if len(scene.layout.things) <= 4 else 40)
    assert max(map(len, (rec.captions for _, rec in world.values()))) == 5


def test_captions_of_crowded_scenes_stay_short():
    config = SceneConfig(min_objects=7, max_objects=7, medium=(0.25, 0.26), max_overlap=0.5)
    for index in range(20):
        rec = record(sample_scene(config, "train", index))
        assert len(mentioned(rec.captions[0])) == 7
        assert max(len(caption.split()) for caption in rec.captions) <= 40


def test_counting_and_negation_captions_are_true(world):
    checked = Counter()
    for scene, rec in world.values():
        things = scene.layout.things
        for caption in rec.captions[1:]:
            if m := re.search(r"(\w+) (?:objects|things), (\w+) of (?:them|which)(?: is| are)? (\w+)$", caption):
                total, count, value = m.groups()
                assert (NUMBERS[len(things)], NUMBERS[len(fitting(value, things))]) == (total, count)
                checked["counting"] += 1
            elif m := re.search(r"(?:without any|there is no|but no|without an?) (.+?)(?: here)?$", caption):
                assert not fitting(m[1], things)
                checked["negation"] += 1
            elif m := re.search(
                r"^(?:exactly|there is|there are|an image with) (\w+) (.+?)(?: in the picture)?$", caption
            ):
                assert NUMBERS[len(fitting(m[2], things))] == m[1]
                checked["exactly"] += 1
    assert min(checked[kind] for kind in ("counting", "negation", "exactly")) > 20


def attribute_target(text: str, things: list) -> list[int]:
    return fitting(text.replace(",", "").replace(" that is", "").replace(" and", "").removeprefix("the "), things)


def position_targets(text: str, things: list) -> list[int]:
    """Objects a careless reader might mean: the noun fits, the centre is in that half or not far off the middle."""
    noun, zone = re.split(r" (?:at the|in the|near the|on the) ", text)
    out = []
    for i in attribute_target(noun, things):
        x, y = things[i].x, things[i].y
        sides = {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5, "side": True}
        middle = max(abs(x - 0.5), abs(y - 0.5)) < 0.2
        if all(sides.get(word, middle) for word in zone.split()):
            out.append(i)
    return out


def superlative_targets(text: str, things: list) -> list[int]:
    _, word, noun = text.split(" ", 2)
    keys = {
        "largest": lambda t: t.radius,
        "biggest": lambda t: t.radius,
        "smallest": lambda t: -t.radius,
        "leftmost": lambda t: -t.x,
        "rightmost": lambda t: t.x,
        "topmost": lambda t: -t.y,
        "highest": lambda t: -t.y,
        "bottommost": lambda t: t.y,
        "lowest": lambda t: t.y,
    }
    candidates = attribute_target(noun, things)
    assert len(candidates) > 1
    return [max(candidates, key=lambda i: keys[word](things[i]))]


def relation_targets(text: str, layout) -> list[int]:
    relations = "(?:to the )?(?:left|right) of|above|below|in front of|partly covering|behind|partly hidden by"
    subject, relation, anchor = re.match(f"(.+?) ({relations}) (.+)$", text).groups()
    (anchor,) = attribute_target(anchor, layout.things)
    there = layout.things[anchor]
    out = []
    for i in attribute_target(subject, layout.things):
        here = layout.things[i]
        holds = {
            "left": here.x < there.x,
            "right": here.x > there.x,
            "above": here.y < there.y,
            "below": here.y > there.y,
            "front": (i, anchor) in layout.covers,
            "covering": (i, anchor) in layout.covers,
            "behind": (anchor, i) in layout.covers,
            "hidden": (anchor, i) in layout.covers,
        }
        if i != anchor and any(value for name, value in holds.items() if name in relation):
            out.append(i)
    return out


def targets(kind: str, text: str, layout) -> list[int]:
    if kind == "relation":
        return relation_targets(text, layout)
    reader = {"attribute": attribute_target, "position": position_targets, "superlative": superlative_targets}[kind]
    return reader(text, layout.things)


def meant(text: str, layout) -> list[int]:
    """The objects a reference of any kind may mean."""
    if re.search(r"\b(of|above|below|covering|behind|by)\b", text):
        return targets("relation", text, layout)
    if re.search(r" (at the|in the|near the|on the) ", text):
        return targets("position", text, layout)
    return targets("superlative" if re.match(r"the \w+(est|most) ", text) else "attribute", text, layout)


def test_captions_relate_the_right_objects(world):
    relations, extremes = 0, 0
    for scene, rec in world.values():
        for caption in rec.captions[1:]:
            if not (m := re.search(r"(the .+) is (.+)$", caption)):
                continue
            subject, said = m.groups()
            if re.match("an? ", said):
                assert set(meant(subject, scene.layout)) <= set(fitting(said, scene.layout.things)), caption
                extremes += 1
            else:
                (index,) = attribute_target(subject, scene.layout.things)
                assert index in relation_targets(f"the object {said}", scene.layout), caption
                relations += 1
    assert min(relations, extremes) > 20


def test_expressions_name_their_target_alone(world):
    kinds = Counter()
    for scene, rec in world.values():
        present = [e for e in rec.expressions if e.box_xyxy]
        boxes = [o.box_xyxy for o in rec.objects]
        assert 3 <= len(present) <= 6
        for expression in present:
            kind, novelty, size = expression.tags
            found = targets(kind, expression.text, scene.layout)
            assert [boxes[i] for i in found] == [expression.box_xyxy], (expression.text, scene.layout)
            own = scene.layout.things[found[0]].attributes
            assert size == own.size
            assert novelty == ("unseen" if (own.shape, own.colour) in HELD_OUT else "seen")
            kinds[kind] += 1
    assert set(kinds) == {"attribute", "relation", "superlative", "position"}
    assert min(kinds.values()) > 0.1 * kinds.total()


def test_absent_expressions_are_absent_near_misses(world):
    for scene, rec in world.values():
        absent = [e for e in rec.expressions if e.box_xyxy is None]
        assert 1 <= len(absent) <= 2
        for expression in absent:
            assert expression.tags[0] == "absent" and expression.mask is None
            assert not attribute_target(expression.text, scene.layout.things)


def test_expression_masks_are_those_of_the_boxes(world):
    for scene, rec in itertools.islice(world.values(), 40):
        masks = object_masks(scene, rec.width)
        boxes = [o.box_xyxy for o in rec.objects]
        for expression in (e for e in rec.expressions if e.mask):
            decoded = coco_mask.decode({"size": list(expression.mask.size), "counts": expression.mask.counts.encode()})
            assert np.array_equal(decoded.astype(bool), masks[boxes.index(expression.box_xyxy)])


def test_region_descriptions_are_unique(world):
    for scene, rec in world.values():
        singles = rec.regions[: len(scene.layout.things)]
        assert [r.box_xyxy for r in singles] == [o.box_xyxy for o in rec.objects]
        assert all(2 <= len(r.descriptions) <= 4 for r in singles)
        texts = [text for region in rec.regions for text in region.descriptions]
        assert len(texts) == len(set(texts))


def test_groups_have_the_box_around_their_members(world):
    seen = 0
    for scene, rec in world.values():
        for region in rec.regions[len(scene.layout.things) :]:
            (text,) = region.descriptions
            members = [rec.objects[i].box_xyxy for i in fitting(text.removeprefix("the "), scene.layout.things)]
            number = re.search(r"\b(" + "|".join(NUMBERS) + r"|both)\b", text)[1].replace("both", "two")
            assert number == NUMBERS[len(members)]
            left, top, right, bottom = zip(*members, strict=True)
            assert region.box_xyxy == (min(left), min(top), max(right), max(bottom))
            seen += 1
    assert seen > COUNT


def test_answers_are_true_and_yes_is_as_frequent_as_no(world):
    answers, kinds = Counter(), Counter()
    for scene, rec in world.values():
        things = scene.layout.things
        for question in rec.questions:
            ((answer, weight),) = question.answers.items()
            assert weight == 1.0
            kinds[question.kind] += 1
            if question.kind == "count":
                phrase = re.search(r"how many (.+?) (?:are there|does the picture show)$", question.text)[1]
                assert str(len(fitting(phrase, things))) == answer
            elif question.kind == "yes/no":
                answers[answer] += 1
                if m := re.match(r"(?:is there|does the picture show|can you see) an? (.+)$", question.text):
                    assert bool(fitting(m[1], things)) == (answer == "yes")
            elif question.kind in ("colour", "shape", "size", "texture"):
                subject = re.search(r"the .+?(?= have$|$)", question.text)[0]
                (index,) = meant(subject, scene.layout)
                assert getattr(things[index].attributes, question.kind) == answer, question.text
            else:
                (index,) = meant(question.text[re.search("the (?!picture)", question.text).start() :], scene.layout)
                assert index in position_targets(f"the object at the {answer}", things)
    assert set(kinds) == {"count", "yes/no", "colour", "shape", "size", "texture", "where"}
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_front_and_behind_follow_the_masks():
    seen = Counter()
    for index in range(40):
        scene = sample_scene(CONFIG, "train", index)
        n = len(scene.layout.things)
        for front, back in itertools.permutations(range(n), 2):
            holds = relation_holds(scene.layout, "front", front, back)
            assert holds == relation_holds(scene.layout, "behind", back, front)
            alone = object_masks(sample_alone(CONFIG, index, back), 128)[0]
            share = (alone & object_masks(scene, 128)[front]).sum() / alone.sum()
            if holds:
                assert front > back and share > 0.03
            elif holds is False and front > back:
                assert share < 0.01
            assert front > back or holds is False
            seen[holds] += 1
    assert seen[True] > 10 and seen[False] > 10


JUDGES = {
    r"the left image has more (?P<what>.+) than the right one": lambda left, right, number: left > right,
    r"there are fewer (?P<what>.+) in the left image than in the right one": lambda left, right, number: left < right,
    r"both images have the same number of (?P<what>.+)": lambda left, right, number: left == right,
    r"both images contain an? (?P<what>.+)": lambda left, right, number: min(left, right) > 0,
    r"neither image contains an? (?P<what>.+)": lambda left, right, number: left + right == 0,
    r"only the left image contains an? (?P<what>.+)": lambda left, right, number: left > 0 and not right,
    r"only the right image contains an? (?P<what>.+)": lambda left, right, number: right > 0 and not left,
    r"the two images show (?P<number>\w+) (?P<what>.+) in total": lambda left, right, number: left + right == number,
}


def test_statements_are_true_as_labelled_and_balanced(world):
    labels = Counter()
    for (split, index), (scene, rec) in world.items():
        other, other_record = world[split, index ^ 1]
        assert rec.statements
        for statement in rec.statements:
            assert statement.other == other_record.id
            ((found, judge),) = [(m, judge) for p, judge in JUDGES.items() if (m := re.fullmatch(p, statement.text))]
            number = NUMBERS.index(found.groupdict().get("number", "zero"))
            left, right = (len(fitting(found["what"], s.layout.things)) for s in (scene, other))
            assert judge(left, right, number) == statement.label, statement.text
            labels[statement.label] += 1
    assert 0.42 < labels[True] / labels.total() < 0.58


def test_vocabulary_covers_the_language_and_more(world):
    words = vocabulary()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(words) == len(set(words)) < 512
    assert {"a", "##a", "z", "##z", "7", "##7", ",", "."} <= set(words)
    known = set(words)
    more = (record(sample_scene(SceneConfig(seed=1, max_objects=7), "test", index)) for index in range(260))
    for rec in itertools.chain((rec for _, rec in world.values()), more):
        texts = [*rec.captions, *(text for region in rec.regions for text in region.descriptions)]
        texts += [e.text for e in rec.expressions] + [s.text for s in rec.statements]
        texts += [text for q in rec.questions for text in (q.text, *q.answers)]
        said = set(" ".join(texts).replace(",", "").split())
        assert said <= known, said - known
        assert all(re.fullmatch("[a-z0-9 ,]+", text) for text in texts)


def test_config_rejects_sizes_that_blend():
    with pytest.raises(ValidationError, match="1\\.2 times"):
        SceneConfig(small=(0.16, 0.25))
    with pytest.raises(ValidationError, match="min_objects 4 exceeds"):
        SceneConfig(min_objects=4, max_objects=3)


def test_objects_that_do_not_fit_are_an_error():
    config = SceneConfig(
        min_objects=7, max_objects=7, small=(0.3, 0.32), medium=(0.4, 0.42), large=(0.55, 0.6), max_overlap=0
    )
    with pytest.raises(ValueError, match="no room for 7"):
        sample_scene(config, "train", 0)
