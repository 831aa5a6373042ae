"""RandAugment: which operations are drawn, and how often."""

from random import Random

import pytest

from xvlm.data.randaugment import COLOUR, MOVING, Operation, draw


def test_every_operation_is_used_and_half_of_them_not():
    used = [operation for seed in range(1000) for operation in draw("full", Random(seed))]
    assert set(used) == {*map(Operation, COLOUR), *(Operation(name, sign) for name in MOVING for sign in (1, -1))}
    assert len(used) / 2000 == pytest.approx(0.5, abs=0.04)


def test_colours_move_nothing():
    used = [operation for seed in range(100) for operation in draw("colour", Random(seed))]
    assert {operation.name for operation in used} == set(COLOUR)
    assert not any(operation.moves for operation in used)


def test_none_is_none():
    rng = Random(3)
    assert draw("none", rng) == [] and rng.random() == Random(3).random()
