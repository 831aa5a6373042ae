"""Which sample is at which position of a run, when several sources are mixed: a function of (seed, position) alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from xvlm.data.shards import epoch_order

BLOCK = 10_000  # positions in which the shares hold exactly


class Mixture:
    """Sources in given shares, each an endless row of its own epochs.

    Of every ``BLOCK`` positions each source has the same number, spread evenly: the k-th of a source's c falls into the
    k-th of c equal stretches, at random within it.

    Args:
        sizes: samples of each shard, by source.
        weights: by source, in any unit.

    Raises:
        ValueError: a source's share is less than one in ``BLOCK``.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]], weights: Mapping[str, float], seed: int):
        self.names, self.sizes, self.seed = list(sizes), sizes, seed
        ends = np.cumsum([weights[name] for name in self.names])
        self.counts = np.diff(np.round(ends / ends[-1] * BLOCK).astype(int), prepend=0)
        if not self.counts.all():
            name = self.names[int(self.counts.argmin())]
            raise ValueError(f"sources.{name}.weight: {weights[name]:g} of {ends[-1]:g} is less than one in {BLOCK}")
        self._pattern: tuple[int, np.ndarray] | None = None  # the block it is of
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # the epoch of each

    def at(self, position: int) -> tuple[str, int, int]:
        """Source, and epoch and sample of it."""
        block, offset = divmod(position, BLOCK)
        if self._pattern is None or self._pattern[0] != block:
            self._pattern = block, self._arrange(block)
        pattern = self._pattern[1]
        source = pattern[offset]
        drawn = block * int(self.counts[source]) + int((pattern[:offset] == source).sum())
        name = self.names[source]
        epoch, place = divmod(drawn, sum(self.sizes[name]))
        if name not in self._orders or self._orders[name][0] != epoch:
            self._orders[name] = epoch, epoch_order(self.sizes[name], self.seed, epoch, key=name)
        return name, epoch, int(self._orders[name][1][place])

    def _arrange(self, block: int) -> Int[np.ndarray, "position"]:
        random = np.random.default_rng([self.seed, block])
        when = np.concatenate([(np.arange(count) + random.random(count)) / count for count in self.counts])
        return np.repeat(np.arange(len(self.counts)), self.counts)[np.argsort(when, kind="stable")]
