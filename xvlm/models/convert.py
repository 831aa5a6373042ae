"""State dicts of other systems into ours: tables of names, nothing else.

Each function is pure: names and tensors in, names and tensors out. A name that no rule knows stays as it is. What comes
out is then loaded strictly: one error lists every tensor that found no place and every place that found no tensor.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]

# BERT's and RoBERTa's names (with X-VLM's cross-attention) within one layer.
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
    r"lm_head\.dense\.": r"word_head.dense.",
    r"lm_head\.layer_norm\.": r"word_head.norm.",
    r"lm_head\.bias$": r"word_head.bias",
}
# Buffers that are rebuilt, the second names of tied tensors, and BERT's pooler and next-sentence head.
_DROPPED = "|".join(
    [
        r"embeddings\.position_ids$",
        r"(cls\.predictions|lm_head)\.decoder\.(weight|bias)$",
        r"pooler\.",
        r"cls\.seq_relationship\.",
    ]
)

# The names of X-VLM's CLIP-ViT, which are those of transformers' CLIP without the outer ones.
_CLIP = {
    r"patch_embed\.weight$": r"patch_embed.proj.weight",
    r"pre_layrnorm\.": r"norm_pre.",
    r"post_layernorm\.": r"norm.",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.(\d+)\.mlp\.": r"blocks.\1.mlp.",
}

# What is read off both sides, in X-VLM's names (those of ALBEF too, where it has them).
HEADS = {
    "temp": "temperature",
    "vision_proj": "image_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
    "bbox_head": "box_head",
    "cls_head": "truth_head",
    "ta_head": "assignment_head",
}
# ALBEF's averaged copies of its modules, and its queues of features of past batches.
_TRAINING_ALONE = r"\w+_m\.|(image|text|idx)_queue$|queue_ptr$"


def bert(state: State, text_layers: int, looks: int = 1) -> State:
    """A BERT-family state dict (BERT, RoBERTa, MiniLM, X-VLM's) -> text encoder, cross encoder, word head.

    Args:
        text_layers: how many layers make the text encoder; the layers above become the cross encoder.
        looks: how many of these follow each other with the same keys and values; the first of them keeps these.
    """

    def rename(name: str) -> str | None:
        inner = re.sub(r"^(text_encoder\.|text_decoder\.)?(bert\.|roberta\.)?", "", name)
        if re.match(_DROPPED, inner):
            return None
        if found := re.match(r"encoder\.layer\.(\d+)\.(.*)", inner):
            number, inside = int(found[1]), _by_table(_LAYER, found[2])
            upper = number >= text_layers
            if upper and (number - text_layers) % looks and re.match(r"cross_attention\.(key|value)\.", inside):
                return None
            return f"cross.layers.{number - text_layers}.{inside}" if upper else f"text.layers.{number}.{inside}"
        return _by_table(_REST, inner, unknown=name)

    return _renamed(state, rename)


def swin(state: State) -> State:
    """The official Swin layout -> timm's: merging moves to the next stage's start; index and mask are rebuilt."""

    def rename(name: str) -> str | None:
        if name.endswith(("relative_position_index", "attn_mask")):
            return None
        return re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)

    return _renamed(state, rename)


def clip_vit(state: State) -> State:
    """The official CLIP-ViT layout -> timm's: one matrix for query, key and value; positions as a plain tensor."""
    converted = _renamed(state, lambda name: None if name == "position_ids" else _by_table(_CLIP, name))
    for theirs, ours in (("class_embedding", "cls_token"), ("pos_embed.weight", "pos_embed")):
        if theirs in converted:
            tensor = converted.pop(theirs)
            converted[ours] = tensor.reshape(1, -1, tensor.shape[-1])
    for query in [name for name in converted if ".self_attn.q_proj." in name]:
        names = [query.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if converted.keys() >= set(names):
            joined = re.sub(r"encoder\.layers\.(\d+)\.self_attn\.q_proj", r"blocks.\1.attn.qkv", query)
            converted[joined] = torch.cat([converted.pop(name) for name in names])
    return converted


def official(state: State, text_layers: int, looks: int = 1) -> State:
    """An official X-VLM or ALBEF state dict, with any of its image and text encoders -> :class:`xvlm.XVLM`.

    Of the pre-training, retrieval, grounding and NLVR2 models; the last have two ``looks``. One with a decoder ->
    :class:`xvlm.models.decoder.Answerer` if it has an encoder of questions too, else
    :class:`xvlm.models.decoder.Captioner`, whose decoder is the whole stack, text layers and all.
    """
    parts: dict[str, State] = {"vision_encoder.": {}, "text_encoder.": {}, "text_decoder.": {}, "": {}}
    for name, tensor in state.items():
        name = re.sub(r"^visual_encoder\.", "vision_encoder.", name)  # ALBEF's
        prefix = next(p for p in parts if name.startswith(p))
        parts[prefix][name] = tensor
    vision = {name.removeprefix("vision_encoder."): tensor for name, tensor in parts["vision_encoder."].items()}
    if "class_embedding" in vision:
        vision = clip_vit(vision)
    elif "cls_token" not in vision:  # the plain ViT has timm's names
        vision = swin(vision)
    vision = {f"vision.trunk.{name}": tensor for name, tensor in vision.items()}
    rest = _renamed(parts[""], _head)
    decoder = bert(parts["text_decoder."], 0 if parts["text_encoder."] else text_layers)
    decoder = {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    return vision | bert(parts["text_encoder."], text_layers, looks) | decoder | rest


def for_looks(state: State, looks: int) -> State:
    """The state dict of an :class:`xvlm.XVLM` with one look -> of one with ``looks``: each cross layer once for each.

    The copies start equal; keys and values, which they share, are the first one's (X-VLM's NLVR2 model).
    """
    repeated: State = {}
    for name, tensor in state.items():
        found = re.match(r"cross\.layers\.(\d+)\.(.*)", name)
        if found is None:
            repeated[name] = tensor
            continue
        shared = re.match(r"cross_attention\.(key|value)\.", found[2])
        for look in range(1 if shared else looks):
            repeated[f"cross.layers.{int(found[1]) * looks + look}.{found[2]}"] = tensor
    return repeated


def for_captions(state: State) -> State:
    """The state dict of an :class:`xvlm.XVLM` -> of a :class:`xvlm.models.decoder.Captioner`: what read now writes."""
    moved = _renamed(state, lambda name: re.sub(r"^(text|cross|word_head)\.", r"decoder.\1.", name))
    return {name: tensor for name, tensor in moved.items() if name.startswith(("vision.", "decoder."))}


def from_captions(state: State) -> State:
    """The way back from :func:`for_captions`: what wrote reads again."""
    return _renamed(state, lambda name: name.removeprefix("decoder."))


def for_answers(state: State, decoder_layers: int, *, same_width: bool) -> State:
    """The state dict of an :class:`xvlm.XVLM` -> of a :class:`xvlm.models.decoder.Answerer`, as far as it goes.

    The decoder begins as the cross encoder; without its keys and values, made for patches, unless words have the
    ``same_width`` (X-VLM's VQA model).
    """

    def rename(name: str) -> str | None:
        upper = re.match(r"cross\.layers\.(\d+)\.(cross_attention\.(?:key|value)\.)?", name)
        if upper and (int(upper[1]) >= decoder_layers or (upper[2] and not same_width)):
            return None
        return f"decoder.{name}" if upper or re.match(r"text\.(?!layers\.)|word_head\.", name) else None

    reads = {name: tensor for name, tensor in state.items() if name.startswith(("vision.", "text.", "cross."))}
    return reads | _renamed(state, rename)


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


def _head(name: str) -> str | None:
    if re.match(_TRAINING_ALONE, name):
        return None
    part, dot, inside = name.partition(".")
    return HEADS.get(part, part) + dot + inside


def _by_table(table: dict[str, str], name: str, unknown: str | None = None) -> str:
    """The name by the first rule that fits, or ``unknown`` (the name itself) by none."""
    for pattern, replacement in table.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name if unknown is None else unknown


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
