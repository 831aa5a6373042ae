"""Official checkpoint files: what kind one is, the model's shape read off its tensors, and its weights under our names.

An official file is a pickle of ``{"model": state dict, "config": the YAML it was trained with}`` or the bare state dict
(X-VLM, ``Pretrain.py``). Every tensor in it is accounted for: renamed, resized, or dropped for a reason.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from xvlm.models import convert, resize
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig, load_strictly, misfits

State = dict[str, Tensor]

VISION, TEXT = "vision_encoder.", "text_encoder.bert."
TRUNK = "swin_base_patch4_window7_224"
SWIN_B = {"patch_size": 4, "window_size": 7, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}

# Why a tensor of the file has no place in ours, by the end of its name.
_DROPPED = {
    r"relative_position_index|attn_mask": "rebuilt from image and window size",
    r"embeddings\.position_ids": "rebuilt, it counts",
    r"cls\.predictions\.decoder\.(weight|bias)": "the second name of a tied tensor",
    r"pooler\..*|cls\.seq_relationship\..*": "BERT's own, X-VLM does not use it",
}
# Second name -> first name: both are stored, and must be equal for one to be enough.
_TIED = {
    "text_encoder.cls.predictions.decoder.weight": f"{TEXT}embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}


@dataclass(frozen=True)
class Converted:
    """A checkpoint as ours, and what became of each tensor of the file."""

    config: XVLMConfig
    state: State
    renamed: dict[str, str]  # of the file -> ours
    dropped: dict[str, str]  # of the file -> why
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # ours -> shape before, shape after
    trained_with: dict[str, Any]  # the configuration in the file, empty where there is none

    def lines(self) -> list[str]:
        """What was renamed, dropped and resized, in words; what differs only in a layer's number shares a line."""
        groups: dict[str, list[int]] = {}

        def add(line: str, tensors: int = 1) -> None:
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", line), []).append(tensors)

        for name, new in self.renamed.items():
            add(f"renamed {name} -> {new}")
        for name, why in self.dropped.items():
            add(f"dropped {name}: {why}")
        for name, (before, after) in self.resized.items():
            add(f"resized {name}: {' x '.join(map(str, before))} -> {' x '.join(map(str, after))}")
        return [line + (f" ({len(tensors)})" if len(tensors) > 1 else "") for line, tensors in groups.items()]


def load(path: Path | str, *, image_size: int | None = None, heads: int | None = None) -> XVLM:
    """The model in an official file, in evaluation mode.

    Raises:
        ValueError: as :func:`read`.
    """
    return build(read(path, image_size=image_size, heads=heads), path)


def build(converted: Converted, origin: object) -> XVLM:
    model = XVLM(converted.config)
    load_strictly(model, converted.state, origin)
    return model.eval()


def read(path: Path | str, *, image_size: int | None = None, heads: int | None = None) -> Converted:
    """Read an official file; nothing in it is run.

    Args:
        image_size: height and width in pixels; position tables are resized. The file's own if not given.
        heads: attention heads of the text side, which no tensor tells; one per 64 dimensions (BERT) if not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or of a kind not supported; a tensor is left over, missing, misshapen or
            not finite, by name; the windows of the trunk do not fit the image size.
    """
    content = convert.read_file(path)
    trained_with = content.get("config") if isinstance(content, dict) else None
    try:
        return official(
            convert.state_of(content, path),
            image_size=image_size,
            heads=heads,
            trained_with=trained_with if isinstance(trained_with, dict) else {},
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def kind(state: State) -> str:
    """Which model an official state dict is of, in words: ``pre-training (Swin, BERT)``, ``VQA (Swin, BERT)``, …

    Raises:
        ValueError: the names are not those of an official checkpoint.
    """

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in state)

    if has("visual_encoder."):
        return "ALBEF"
    trunk = {"layers.": "Swin", "cls_token": "ViT", "class_embedding": "CLIP-ViT"}
    trunks = [name for start, name in trunk.items() if has(VISION + start)]
    if not trunks:
        some = ", ".join(sorted(state)[:3])
        raise ValueError(f"not an official X-VLM checkpoint: no tensor of a known vision_encoder among {some}, …")
    sides = f"({trunks[0]}, {'RoBERTa' if has('text_encoder.roberta.') else 'BERT'})"
    heads = {
        "VQA": has("text_decoder.") and has("text_encoder."),
        "captioning": has("text_decoder."),
        "NLVR2 pre-training": has("ta_head."),
        "NLVR2": has("cls_head."),
        "pre-training": has("bbox_head.") and has("itm_head."),
        "box grounding": has("bbox_head.") and not has("itm_head."),
        "retrieval": has("itm_head.") and not has("bbox_head."),
    }
    return f"{next((name for name, found in heads.items() if found), 'unknown')} {sides}"


def official(
    state: State, *, image_size: int | None = None, heads: int | None = None, trained_with: dict[str, Any] | None = None
) -> Converted:
    """An official pre-training state dict with a Swin trunk and a BERT as ours.

    Args and errors: as :func:`read`.
    """
    if (found := kind(state)) != "pre-training (Swin, BERT)":
        raise ValueError(f"this is a checkpoint of kind {found}; so far only pre-training (Swin, BERT) is supported")
    config = XVLMConfig(
        vision=_vision(state, image_size),
        text=_text(state, heads),
        embed_dim=_shape(state, "vision_proj.weight")[0],
    )
    renamed, dropped, unknown = _names(state, config.text.text_layers)
    with torch.device("meta"):  # shapes only: nothing is allocated before everything is known to fit
        target = XVLM(config).state_dict()
    ours = convert.official(state, config.text.text_layers)
    left = sorted(unknown + [name for name, new in renamed.items() if new not in target])
    missing = [name for name in target if name not in ours]
    if left or missing:
        parts = [f"left over in the file: {', '.join(left)}"] * bool(left)
        parts += [f"missing from the file: {', '.join(missing)}"] * bool(missing)
        raise ValueError("; ".join(parts))
    for second, first in _TIED.items():
        if second in state and not torch.equal(state[second], state[first]):
            raise ValueError(f"{second} differs from {first}, to which it should be tied")
    fitted, changed = resize.fit_tables(ours, target)
    if wrong := misfits(target, fitted):
        raise ValueError("; ".join(wrong))
    shapes = {name: (tuple(ours[name].shape), tuple(fitted[name].shape)) for name in changed}
    return Converted(config, fitted, renamed, dropped, shapes, trained_with or {})


def _names(state: State, text_layers: int) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Name in the file -> ours, name -> why it is dropped, and names without a rule or a place of their own."""
    names = list(state)
    numbered = {name: torch.tensor([i]) for i, name in enumerate(names)}  # the rules look at names alone
    converted = convert.official(numbered, text_layers)
    renamed = {names[i]: new for new, numbers in converted.items() for i in numbers.flatten().tolist()}
    dropped, unknown = {}, []
    for name in names:
        why = next((why for pattern, why in _DROPPED.items() if re.search(rf"({pattern})$", name)), None)
        if name not in renamed and why is not None:
            dropped[name] = why
        elif name not in renamed:
            unknown.append(name)
    return {name: renamed[name] for name in names if name in renamed}, dropped, unknown


def _vision(state: State, image_size: int | None) -> VisionConfig:
    """Swin's shape; its windows grow with the image, as in the reference (7 at 224, 12 at 384, 15 at 480)."""
    dim, _, patch, _ = _shape(state, f"{VISION}patch_embed.proj.weight", 4)
    depths = [
        _count(state, rf"{VISION}layers\.{stage}\.blocks\.") for stage in range(_count(state, rf"{VISION}layers\."))
    ]
    tables = [
        _shape(state, f"{VISION}layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(len(depths))
    ]
    window = math.isqrt(tables[0][0]) // 2 + 1
    step = patch * 2 ** (len(depths) - 1)  # pixels of a patch of the last stage
    mask = state.get(f"{VISION}layers.0.blocks.1.attn_mask")  # one for each window of the first stage
    known = step * window if mask is None else math.isqrt(len(mask)) * window * patch
    size = known if image_size is None else image_size
    every = math.lcm(step, known // math.gcd(known, window))
    if size <= 0 or size % every:
        near = max(every, size // every * every)
        raise ValueError(
            f"image size {size}: the trunk sees windows of {window} patches at {known} pixels, which grow with the "
            f"image to whole patches only at multiples of {every} ({near}, {near + every}, …)"
        )
    found = {
        "patch_size": patch,
        "window_size": window * size // known,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [heads for _, heads in tables],
    }
    options = {key: value for key, value in found.items() if value != SWIN_B[key]}
    return VisionConfig(trunk=TRUNK, image_size=(size, size), options=options)


def _text(state: State, heads: int | None) -> TextConfig:
    vocabulary, dim = _shape(state, f"{TEXT}embeddings.word_embeddings.weight", 2)
    if heads is None and dim % 64:
        raise ValueError(
            f"the text side is {dim} wide, not a multiple of 64: say how many attention heads it has (--heads)"
        )
    if heads is not None and dim % heads:
        raise ValueError(f"the text side is {dim} wide, which {heads} attention heads do not share evenly")
    layers = _count(state, rf"{TEXT}encoder\.layer\.")
    fusing = [n for n in range(layers) if f"{TEXT}encoder.layer.{n}.crossattention.self.query.weight" in state]
    return TextConfig(
        vocab_size=vocabulary,
        dim=dim,
        heads=heads or dim // 64,
        feed_forward=_shape(state, f"{TEXT}encoder.layer.0.intermediate.dense.weight", 2)[0],
        text_layers=layers - len(fusing),
        cross_layers=len(fusing),
        max_positions=_shape(state, f"{TEXT}embeddings.position_embeddings.weight", 2)[0],
        token_types=_shape(state, f"{TEXT}embeddings.token_type_embeddings.weight", 2)[0],
    )


def _shape(state: State, name: str, dims: int = 2) -> tuple[int, ...]:
    if name not in state or state[name].ndim != dims:
        raise ValueError(f"missing from the file: {name}, with {dims} dimensions")
    return tuple(state[name].shape)


def _count(state: State, pattern: str) -> int:
    """How many numbers follow a prefix: layers are counted from 0."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(rf"{pattern}(\d+)\.", name))), default=-1)


def card(name: str, source: Path, converted: Converted) -> str:
    """A README for the folder: where the weights come from, on what they were trained, their licence, what is known."""
    parameters = sum(tensor.numel() for tensor in converted.state.values())
    about = f"{parameters:,} parameters, images of {converted.config.vision.image_size[0]} pixels."
    if converted.resized:
        about += f" {len(converted.resized)} position tables were resized: fine-tune before comparing numbers."
    data = "The file does not say what it was trained on."
    if converted.trained_with:
        plain = json.loads(json.dumps(converted.trained_with, default=str))  # only what YAML can say safely
        data = f"The configuration stored in the file:\n\n```yaml\n{yaml.safe_dump(plain)}```"
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return _CARD.format(name=name, about=about, file=source.name, digest=digest.hexdigest(), data=data)


_CARD = """# {name}

{about} A multi-grained vision-language model (X-VLM, arXiv 2111.08276) for the xvlm library:

    from xvlm import XVLM, Processor
    model, processor = XVLM.from_pretrained("{name}"), Processor.from_pretrained("{name}")

## Where it comes from

`xvlm convert` made it from the official checkpoint `{file}`, SHA-256 `{digest}`.

## Data

{data}

## Licence

That of the checkpoint. X-VLM's repository, which links the official ones, is under BSD-3-Clause.

## Numbers

None were measured after the conversion; published ones are those of the fine-tuned models. `golden.safetensors` holds
what the weights answered when they were converted: `xvlm verify` compares.
"""
