"""VQA accuracy by hand: how many must agree, and each rule by which answers become the same."""

import pytest

from xvlm.metrics.vqa import accuracy, normalise


@pytest.mark.parametrize(
    ("agree", "expected"),
    [(0, 0.0), (1, 9 * (1 / 3) / 10), (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10), (3, (3 * (2 / 3) + 7) / 10), (4, 1.0)],
)
def test_each_of_ten_annotators_is_left_out_in_turn(agree, expected):
    given = ["red"] * agree + [f"other{i}" for i in range(10 - agree)]
    assert accuracy("red", given) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog", "dog"),  # articles and capitals
        ("an apple a day", "apple day"),
        ("two", "2"),  # words of numbers up to ten
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),  # apostrophes come back
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # as the server has it
        ("well", "well"),
        ("red/blue", "red blue"),  # between letters: a space
        ("red / blue", "red blue"),  # beside a space: nothing
        ("t-shirt", "t shirt"),
        ("yes, sir!", "yes sir"),
        ("1,000", "1000"),  # a comma between digits deletes every mark of the answer
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),  # a period stays before a digit
        ("u.s.", "us"),
        ("man's", "man's"),
    ],
)
def test_rules_of_normalisation(text, expected):
    assert normalise(text) == expected


def test_answers_are_normalised_where_annotators_disagree_and_only_there():
    assert accuracy("Two", ["2"] * 9 + ["3"]) == 1.0
    assert accuracy("Two", ["2"] * 10) == 0.0
    assert accuracy(" yes\n", ["yes"] * 10) == 1.0  # space around an answer never counts


def test_a_question_that_nobody_answered():
    with pytest.raises(ValueError, match="nobody has answered"):
        accuracy("yes", [])
