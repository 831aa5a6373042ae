"""How deep each parameter sits, for learning rates that fall from the top layer down."""

from timm.models import group_parameters
from torch import nn

from xvlm.models.text import CrossEncoder, TextEncoder
from xvlm.models.vision import VisionEncoder


def layers_above(model: nn.Module) -> dict[str, int]:
    """For each parameter of an encoder, how many layers of its own side come after its own; heads are left out.

    A trunk's layers are timm's (its stem the lowest, as in BEiT's fine-tuning), text and cross encoder are one stack
    with the embeddings below it. 0 is the top layer.
    """
    above: dict[str, int] = {}
    cross = [len(module.layers) for module in model.modules() if isinstance(module, CrossEncoder)]
    for prefix, module in model.named_modules():
        if isinstance(module, VisionEncoder):
            numbers = group_parameters(module.trunk, module.trunk.group_matcher(), reverse=True)
            above |= {f"{prefix}.trunk.{name}": max(numbers.values()) - n for name, n in numbers.items()}
        elif isinstance(module, TextEncoder | CrossEncoder):
            over = max(cross, default=0) if isinstance(module, TextEncoder) else 0
            top = len(module.layers) - 1 + over
            for name, _ in module.named_parameters():
                part, number, *_ = name.split(".")
                above[f"{prefix}.{name}"] = top - int(number) if part == "layers" else top + 1
    return above
