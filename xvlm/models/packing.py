"""Tokens without padding, and the padded groups in which they attend.

The tokens of all sequences (the words of texts, the patches of regions) lie one after another; only attention needs
rows of equal length, and puts several short sequences into one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where packed tokens sit in a padded layout of groups by slots."""

    groups: int
    slots: int
    position: Int[Tensor, "token"]  # in the flattened padded layout

    @classmethod
    def by(cls, group: Int[Tensor, "token"], groups: int) -> "Packing":
        """Tokens of a group side by side, in their order."""
        counts = torch.bincount(group, minlength=groups)
        order = group.argsort(stable=True)
        slot = torch.empty_like(group)
        slot[order] = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
        slots = int(counts.max())
        return cls(groups, slots, group * slots + slot)

    def pad(self, packed: Tensor) -> Tensor:
        """(token, …) -> (group, slot, …), zeros where there is no token."""
        flat = packed.new_zeros(self.groups * self.slots, *packed.shape[1:]).index_copy_(0, self.position, packed)
        return flat.unflatten(0, (self.groups, self.slots))

    def pack(self, padded: Tensor) -> Tensor:
        """(group, slot, …) -> (token, …)."""
        return padded.flatten(0, 1).index_select(0, self.position)


@dataclass(frozen=True)
class Page:
    """Sequences laid out for self-attention: several short ones share a group, so that little of it is padding."""

    sequence: Int[Tensor, "token"]
    packing: Packing
    group: Int[Tensor, "sequence"]
    time: Int[Tensor, "token"] | None = None  # where it is given, a token sees no later one

    @classmethod
    def of(cls, mask: Bool[Tensor, "sequence slot"], *, causal: bool = False) -> "Page":
        lengths = mask.sum(1).tolist()
        room, used, number, groups = max(lengths, default=0), 0, 0, []
        for length in lengths:
            if used + length > room:
                number, used = number + 1, 0
            used += length
            groups.append(number)
        group = torch.tensor(groups, dtype=torch.long, device=mask.device)
        sequence, slot = mask.nonzero().unbind(1)
        return cls(sequence, Packing.by(group[sequence], number + 1), group, slot if causal else None)

    def part(self, only: Bool[Tensor, "sequence slot"]) -> "Page":
        """Some tokens of the same sequences, in the same groups."""
        sequence, slot = only.nonzero().unbind(1)
        packing = Packing.by(self.group[sequence], self.packing.groups)
        return Page(sequence, packing, self.group, None if self.time is None else slot)

    def sees(self, other: "Page") -> Bool[Tensor, "group slot other"]:
        """Which tokens of ``other`` belong to the same sequence, and are not later where there is a time."""
        mine, theirs = (page.packing.pad(page.sequence + 1) for page in (self, other))
        same = mine[:, :, None] == theirs[:, None, :]
        if self.time is None:
            return same
        mine, theirs = (page.packing.pad(page.time) for page in (self, other))
        return same & (mine[:, :, None] >= theirs[:, None, :])
