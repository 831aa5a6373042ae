"""State dicts of other systems into ours: tables of names, nothing else.

Each function is pure: names and tensors in, names and tensors out. What comes out is then loaded strictly, so a name
that no rule knows is an error and not a half-loaded model.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]

# BERT's names (with X-VLM's cross-attention) within one layer.
_LAYER = {
    r"attention\.self\.(query|key|value)\.": r"attention.\1.",
    r"attention\.output\.dense\.": r"attention.out.",
    r"attention\.output\.LayerNorm\.": r"attention.norm.",
    r"crossattention\.self\.(query|key|value)\.": r"cross_attention.\1.",
    r"crossattention\.output\.dense\.": r"cross_attention.out.",
    r"crossattention\.output\.LayerNorm\.": r"cross_attention.norm.",
    r"intermediate\.dense\.": r"expand.",
    r"output\.dense\.": r"contract.",
    r"output\.LayerNorm\.": r"norm.",
}
_REST = {
    r"embeddings\.word_embeddings\.": r"text.words.",
    r"embeddings\.position_embeddings\.": r"text.positions.",
    r"embeddings\.token_type_embeddings\.": r"text.types.",
    r"embeddings\.LayerNorm\.": r"text.norm.",
    r"cls\.predictions\.transform\.dense\.": r"word_head.dense.",
    r"cls\.predictions\.transform\.LayerNorm\.": r"word_head.norm.",
    r"cls\.predictions\.bias$": r"word_head.bias",
}
# Buffers that are rebuilt, the second names of tied tensors, and BERT's pooler and next-sentence head.
_DROPPED = r"(embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|pooler\..*|cls\.seq_relationship\..*)$"

_OFFICIAL = {
    r"temp$": "temperature",
    r"vision_proj\.": "image_projection.",
    r"text_proj\.": "text_projection.",
    r"itm_head\.": "itm_head.",
    r"bbox_head\.": "box_head.",
}


def bert(state: State, text_layers: int) -> State:
    """A BERT-family state dict (bert-base-uncased, MiniLM, X-VLM's) -> text encoder, cross encoder, word head.

    Args:
        text_layers: how many layers make the text encoder; the layers above become the cross encoder.
    """

    def rename(name: str) -> str | None:
        name = name.removeprefix("bert.")
        if re.match(_DROPPED, name):
            return None
        if found := re.match(r"encoder\.layer\.(\d+)\.(.*)", name):
            number, inside = int(found[1]), _by_table(_LAYER, found[2])
            upper = number >= text_layers
            return f"cross.layers.{number - text_layers}.{inside}" if upper else f"text.layers.{number}.{inside}"
        return _by_table(_REST, name)

    return _renamed(state, rename)


def swin(state: State) -> State:
    """The official Swin layout -> timm's: merging moves to the next stage's start; index and mask are rebuilt."""

    def rename(name: str) -> str | None:
        if name.endswith(("relative_position_index", "attn_mask")):
            return None
        return re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)

    return _renamed(state, rename)


def official(state: State, text_layers: int) -> State:
    """An official X-VLM pre-training state dict with a Swin trunk -> :class:`xvlm.XVLM`."""
    parts = {"vision_encoder.": {}, "text_encoder.": {}, "": {}}
    for name, tensor in state.items():
        prefix = next(p for p in parts if name.startswith(p))
        parts[prefix][name.removeprefix(prefix)] = tensor
    vision = {f"vision.trunk.{name}": tensor for name, tensor in swin(parts["vision_encoder."]).items()}
    rest = _renamed(parts[""], lambda name: _by_table(_OFFICIAL, name))
    return vision | bert(parts["text_encoder."], text_layers) | rest


def in_order(state: State, target: State) -> State:
    """Tensors of a state dict under the names of another that lists the same shapes in the same order.

    For checkpoints of the very same architecture under other names (``efficientnet_lite0`` packages); a classifier that
    follows the last tensor is left out.

    Raises:
        ValueError: the first place at which the two differ.
    """
    ours = {name: tensor for name, tensor in target.items() if not name.endswith("num_batches_tracked")}
    theirs = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    if len(theirs) - len(ours) not in (0, 2):  # two more at the end: a classifier's weight and bias, left out
        raise ValueError(f"{len(theirs)} tensors do not fill the {len(ours)} of the trunk")
    converted = {name: tensor for name, tensor in target.items() if name not in ours}
    for (name, tensor), (their_name, their_tensor) in zip(ours.items(), theirs.items(), strict=False):
        if tensor.shape != their_tensor.shape:
            raise ValueError(
                f"{their_name} {tuple(their_tensor.shape)} does not fit {name} {tuple(tensor.shape)} at the same place"
            )
        converted[name] = their_tensor
    return converted


def _by_table(table: dict[str, str], name: str) -> str:
    for pattern, replacement in table.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    raise ValueError(f"no rule for the tensor {name!r}")


def _renamed(state: State, rename: Callable[[str], str | None]) -> State:
    return {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}


def read_checkpoint(path: Path | str) -> State:
    """A state dict from a ``.pth``/``.th``/``.safetensors`` file without executing what a pickle might contain.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is something else (a web page saved under this name), needs more than tensors and plain
            containers, or holds no state dict.
    """
    return state_of(read_file(path), path)


def read_file(path: Path | str) -> object:
    """Whatever a checkpoint file holds, as :func:`read_checkpoint` reads it: often more than the state dict."""
    with Path(path).open("rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(
            f"{path}: a web page, not a checkpoint: the download gave its page instead of the file; download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not a checkpoint; fetch the file it stands for (git lfs pull)")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the readers raise whatever they trip over
        raise ValueError(f"{path}: not loaded, because {_reason(error)}") from None


def state_of(content: object, path: Path | str) -> State:
    """The state dict in what :func:`read_file` gave: all of it, or what is under ``model``."""
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state


def _reason(error: Exception) -> str:
    """One line; torch's own message is a page, and advises to run the file's code."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it does not load as plain weights: it needs {found[1]}, which may run code"
    first = next(iter(str(error).splitlines()), "")
    return f"it does not load as plain weights, is damaged or no checkpoint: {type(error).__name__} {first}".rstrip()
