"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): a few linear layers learn, each by two thin matrices.

An adapted layer keeps the names of its own weights, so that with the thin matrices added to them (:func:`merged`) the
model is what it was before: its folder is loaded strictly, by those who know nothing of this.
"""

import copy
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from xvlm.config import Configured


class LoraConfig(Configured):
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # what is learned is added alpha / rank times
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what goes into the thin matrices
    # Linear layers of the model by name, `*` for anything. These are in the attention of text, cross encoder and
    # decoder; in the image trunks of timm it is `vision.trunk.*.qkv`.
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("*.query", "*.value")


class LowRank(nn.Linear):
    """A linear layer to whose weight ``up @ down * scale`` is added; at first nothing, because ``up`` is zero."""

    def __init__(self, layer: nn.Linear, config: LoraConfig):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.down = nn.Parameter(layer.weight.new_empty(config.rank, layer.in_features))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as linear layers start

    def forward(self, x: Float[Tensor, "*n inside"]) -> Float[Tensor, "*n outside"]:
        learned = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.down), self.up)
        return super().forward(x) + self.scale * learned

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that gives the same."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.weight + self.scale * self.up @ self.down)
        made.bias = self.bias
        return made


def adapt(model: nn.Module, config: LoraConfig, fresh: Iterable[str] = ()) -> None:
    """Put thin matrices into the model's chosen layers; nothing learns but these and the ``fresh`` parameters.

    Raises:
        ValueError: a pattern that fits no linear layer, or parameters that are not there.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"lora.layers: no linear layer of the model fits {pattern!r}; there are {_some(linear)}")
    fresh = set(fresh)
    if unknown := fresh - dict(model.named_parameters()).keys():
        raise ValueError(f"fresh parameters the model does not have: {_some(unknown)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in fresh)
    for name, layer in linear.items():
        if any(fnmatchcase(name, pattern) for pattern in config.layers):
            model.set_submodule(name, LowRank(layer, config))


def merged(model: nn.Module) -> nn.Module:
    """A copy in which every adapted layer is a plain one again; the model itself where nothing is adapted."""
    if not any(isinstance(module, LowRank) for module in model.modules()):
        return model
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, LowRank):
            made.set_submodule(name, module.merged())
    return made


def _some(names: Iterable[str]) -> str:
    first = sorted(names)[:5]
    return ", ".join(first) + (" …" if len(first) == 5 else "")
