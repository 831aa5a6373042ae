"""Kinds of texts by their words: against what is known of generated sentences, and on sentences of people."""

import pytest

from xvlm.data import scenes
from xvlm.metrics.slices import OTHER, RULES, kinds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("man", {OTHER}),
        ("left guy", {"position"}),
        ("the right one", {"position"}),
        ("Man left of the dog", {"relation"}),
        ("dog on left, behind the sofa", {"relation", "position"}),
        ("woman near the top", {"position"}),
        ("woman near a car", {"relation"}),
        ("2nd biggest white cow", {"attribute", "size"}),
        ("the two giraffes", {"count"}),
        ("the one in red", {"attribute"}),
        ("exactly one dog", {"count"}),
        ("How many people aren't wearing hats?", {"count", "negation", "relation"}),
        ("a street without cars", {"negation"}),
        ("a notable knot of nobles", {OTHER}),
        ("The left image contains twice the number of dogs as the right image.", {"count"}),
        ("the left image has more discs than the right one", {"count"}),
        ("one image shows a dog in the left corner", {"position"}),
    ],
)
def test_kinds_by_hand(text, expected):
    assert set(kinds(text)) == expected
    assert expected <= {*RULES, OTHER}


@pytest.fixture(scope="module")
def records():
    return [scenes.record(scenes.sample_scene(scenes.SceneConfig(), "test", i), 32) for i in range(60)]


def test_what_scenes_say_of_their_expressions_is_found_in_the_words(records):
    """A scene knows how it refers to something; position is said of superlatives ("leftmost") too."""
    said = [expression for record in records for expression in record.expressions]
    for kind in ("relation", "position"):
        tagged = [each for each in said if kind in each.tags]
        assert len(tagged) > 20 and all(kind in kinds(each.text) for each in tagged)
    for each in said:
        if not {"relation"} & set(each.tags):
            assert "relation" not in kinds(each.text), each.text
        if not {"position", "superlative"} & set(each.tags):
            assert "position" not in kinds(each.text), each.text


def test_what_scenes_ask_and_compare_is_found_in_the_words(records):
    asked = [question for record in records for question in record.questions]
    found = {"colour": "attribute", "texture": "attribute", "size": "size", "count": "count", "where": "position"}
    for kind, expected in found.items():
        some = [question.text for question in asked if question.kind == kind]
        wrong = [text for text in some if expected not in kinds(text)]
        assert len(some) > 5 and not [text for text in wrong if not text.startswith("how big")]
    stated = [statement.text for record in records for statement in record.statements]
    assert all(("negation" in kinds(text)) == ("neither" in text) for text in stated)
    assert not any("position" in kinds(text) or "relation" in kinds(text) for text in stated)
    captions = [caption for record in records for caption in record.captions]
    assert all(("negation" in kinds(c)) == bool({"no", "without"} & set(c.split())) for c in captions)
