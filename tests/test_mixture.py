"""Mixtures: shares hold in every stretch of a run, each source runs through its own epochs, a position says it all."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xvlm.data.mixture import BLOCK, Mixture
from xvlm.data.shards import epoch_order

SIZES = {"a": [5, 2], "b": [3], "c": [1, 1, 9]}
WEIGHTS = {"a": 2.0, "b": 0.5, "c": 1.0}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 2 * BLOCK))
def test_every_stretch_has_the_shares(weights, seed, end):
    names = [str(n) for n in range(len(weights))]
    mixture = Mixture({name: [3] for name in names}, dict(zip(names, weights, strict=True)), seed)
    assert mixture.counts.sum() == BLOCK
    pattern = np.concatenate([mixture._arrange(block) for block in range(3)])[:end]
    for n, weight in enumerate(weights):
        assert abs((pattern == n).sum() - end * weight / sum(weights)) <= 1 + 3  # 3: a block's rounding, thrice


def test_each_source_runs_through_its_own_epochs():
    mixture = Mixture(SIZES, WEIGHTS, seed=4)
    drawn = [mixture.at(position) for position in range(400)]
    assert Counter(name for name, _, _ in drawn)["a"] == pytest.approx(400 * 2 / 3.5, abs=2)
    for name, sizes in SIZES.items():
        mine = [(epoch, index) for source, epoch, index in drawn if source == name]
        whole = len(mine) // sum(sizes)
        for epoch in range(whole):
            part = mine[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
            assert {e for e, _ in part} == {epoch}
            assert sorted(index for _, index in part) == list(range(sum(sizes)))
        assert whole >= 10


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=20))
def test_a_position_says_it_all(positions):
    walked = Mixture(SIZES, WEIGHTS, seed=4)
    assert all(walked.at(position) == Mixture(SIZES, WEIGHTS, seed=4).at(position) for position in positions)


def test_one_source_is_its_epochs_end_to_end():
    mixture = Mixture({"": [4, 3]}, {"": 7.0}, seed=2)
    found = [mixture.at(position)[1:] for position in range(21)]
    assert found == [(epoch, int(i)) for epoch in range(3) for i in epoch_order([4, 3], 2, epoch)]


def test_sources_of_the_same_shards_have_orders_of_their_own():
    mixture = Mixture({"a": [50], "b": [50]}, {"a": 1.0, "b": 1.0}, seed=0)
    orders = {name: [i for source, _, i in map(mixture.at, range(60)) if source == name] for name in "ab"}
    assert orders["a"][:25] != orders["b"][:25]


def test_a_share_too_small_to_come_up_is_refused():
    with pytest.raises(ValueError, match=r"sources\.b\.weight: 0\.0001 of 5\.0001 is less than one in 10000"):
        Mixture({"a": [1], "b": [1]}, {"a": 5.0, "b": 1e-4}, 0)
