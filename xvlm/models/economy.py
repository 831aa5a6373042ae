"""Less memory and less time for the same numbers: gradient checkpointing and ``torch.compile`` of the encoders.

Both leave weights and their names alone and work on any module that holds a :class:`VisionEncoder` or text layers: they
replace methods of the instances, so a deep copy made afterwards still calls the original's. Compile first, where both
are wanted: what is computed anew is then compiled too.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xvlm.models.text import Layer
from xvlm.models.vision import VisionEncoder


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only what enters the trunk's blocks and the parts of text layers; the backward pass computes the rest anew.

    Raises:
        ValueError: timm cannot do it for this trunk.
    """
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            try:
                module.trunk.set_grad_checkpointing(True)
            except (AttributeError, AssertionError) as error:
                raise ValueError(
                    f"gradient_checkpointing: timm does not have it for {module.config.trunk}: {error}"
                ) from None
        elif isinstance(module, Layer):
            for owner, name in _parts(module):
                setattr(owner, name, partial(checkpoint, getattr(owner, name), use_reentrant=False))


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the trunk as one graph, and the parts of text layers as one graph each, for any number of words.

    Laying words and questions out in groups stays outside: it reads lengths on the host. All layers of an encoder share
    the graphs of the first.
    """
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            name = "forward_intermediates" if module.config.local_layers else "forward_features"
            setattr(module.trunk, name, torch.compile(getattr(module.trunk, name), backend=backend))
        elif isinstance(module, Layer):
            for owner, name in _parts(module):
                setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True, backend=backend))


def _parts(layer: Layer) -> list[tuple[nn.Module, str]]:
    """A text layer's methods that run without looking at lengths."""
    attentions = [part for part in (layer.attention, layer.cross_attention) if part is not None]
    return [*((part, "forward") for part in attentions), (layer, "feed_forward")]
