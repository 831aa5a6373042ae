"""Official state dicts: what kind of model one is of, and that model's shape, read off names and shapes of tensors."""

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xvlm.models import convert
from xvlm.models.decoder import AnswererConfig, CaptionerConfig
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import PRETRAINING_HEADS, XVLMConfig

State = dict[str, Tensor]
Config = XVLMConfig | AnswererConfig | CaptionerConfig

# What each use of the model needs of its heads; those with a decoder are models of their own.
HEADS: dict[str, tuple[str, ...]] = {
    "pretraining": PRETRAINING_HEADS,
    "retrieval": ("image_projection", "text_projection", "temperature", "itm_head"),
    "grounding": ("box_head",),
    "nlvr": ("truth_head",),
    "nlvr_pretraining": ("image_projection", "assignment_head"),
}
TASKS = (*HEADS, "vqa", "captioning")
LOOKS = {"nlvr": 2, "nlvr_pretraining": 2}

SWIN = "swin_base_patch4_window7_224"
SWIN_B = {"patch_size": 4, "window_size": 7, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
VIT_B = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
LOCAL_LAYERS = 4  # of X-VLM's ViTs, which encode regions anew in them; ALBEF knows no regions


@dataclass(frozen=True)
class Kind:
    """Which model a state dict is of, and where in it the two sides are."""

    task: str
    trunk: str  # Swin, ViT or CLIP-ViT
    vision: str  # prefix of the image side's names
    text: str  # of the text side's: the encoder's, or the decoder's where there is no other
    roberta: bool

    @property
    def albef(self) -> bool:
        return self.vision == "visual_encoder."

    @property
    def looks(self) -> int:
        return LOOKS.get(self.task, 1)

    def __str__(self) -> str:
        return f"{'ALBEF ' * self.albef}{self.task} ({self.trunk}, {'RoBERTa' if self.roberta else 'BERT'})"


def kind(state: State) -> Kind:
    """Which model an official state dict is of.

    Raises:
        ValueError: the names are not those of an official checkpoint, or of a model there is none of here.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in state)

    vision = "visual_encoder." if has("visual_encoder.") else "vision_encoder."
    trunks = {"layers.": "Swin", "cls_token": "ViT", "class_embedding": "CLIP-ViT"}
    trunk = next((trunk for start, trunk in trunks.items() if has(vision + start)), None)
    side = next((side for side in ("text_encoder.", "text_decoder.") if has(side)), None)
    if trunk is None or side is None:
        some = ", ".join(sorted(state)[:3])
        raise ValueError(
            f"not an official checkpoint of X-VLM or ALBEF: no image and text encoder of theirs among {some}, …"
        )
    if has("cls_head.") and "cls_head.3.weight" not in state:
        raise ValueError("its cls_head is not X-VLM's: ALBEF's NLVR2 and visual entailment models have no place here")
    marks = {
        "vqa": side == "text_encoder." and has("text_decoder."),
        "captioning": side == "text_decoder.",
        "nlvr": has("cls_head."),
        "nlvr_pretraining": has("ta_head."),
        "pretraining": has("text_encoder.cls.", "text_encoder.lm_head."),
        "grounding": has("bbox_head."),
        "retrieval": has("itm_head."),
    }
    task = next((task for task, marked in marks.items() if marked), None)
    if task is None:
        raise ValueError(f"towers without a head: expected one of {', '.join(convert.HEADS)}, or a decoder")
    text = next(side + inner for inner in ("bert.", "roberta.", "") if has(side + inner))
    types = state.get(f"{text}embeddings.token_type_embeddings.weight")
    # Fine-tuned files do not name the family; RoBERTa has one token type, BERT two.
    roberta = text.endswith("roberta.") or (text == side and types is not None and len(types) == 1)
    return Kind(task, trunk, vision, text, roberta)


def config(state: State, kind: Kind, *, image_size: int | None = None, heads: int | None = None) -> Config:
    """The shape of the model.

    Args and errors: as :func:`xvlm.models.checkpoints.read`.
    """
    vision = (_swin if kind.trunk == "Swin" else _vit)(state, kind, image_size, heads)
    text = _text(state, kind, heads)
    if kind.task == "captioning":
        return CaptionerConfig(vision=vision, text=text)
    if kind.task == "vqa":
        layers = _count(state, r"text_decoder\.(?:bert\.|roberta\.)?encoder\.layer\.")
        return AnswererConfig(vision=vision, text=text, decoder_layers=layers)
    there = {convert.HEADS.get(name.partition(".")[0]) for name in state}
    needed = there | set(HEADS[kind.task]) - ({"box_head"} if kind.albef else set())
    every = dict.fromkeys((*PRETRAINING_HEADS, *convert.HEADS.values()))
    shape: dict[str, Any] = {"heads": tuple(head for head in every if head in needed)}
    if "vision_proj.weight" in state:
        shape["embed_dim"] = _shape(state, "vision_proj.weight")[0]
    if "itm_head.weight" in state:
        shape["matching"] = "linear"
    return XVLMConfig.model_validate({"vision": vision, "text": text, **shape})


def _swin(state: State, kind: Kind, image_size: int | None, _: int | None) -> VisionConfig:
    """Swin's windows grow with the image, as in the reference (7 at 224, 12 at 384, 15 at 480)."""
    trunk = kind.vision
    dim, _, patch, _ = _shape(state, f"{trunk}patch_embed.proj.weight", 4)
    depths = [
        _count(state, rf"{trunk}layers\.{stage}\.blocks\.") for stage in range(_count(state, rf"{trunk}layers\."))
    ]
    tables = [
        _shape(state, f"{trunk}layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(len(depths))
    ]
    window = math.isqrt(tables[0][0]) // 2 + 1
    step = patch * 2 ** (len(depths) - 1)  # pixels of a patch of the last stage
    mask = state.get(f"{trunk}layers.0.blocks.1.attn_mask")  # one for each window of the first stage
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
    return VisionConfig(trunk=SWIN, image_size=(size, size), options=_unlike(SWIN_B, found))


def _vit(state: State, kind: Kind, image_size: int | None, heads: int | None) -> VisionConfig:
    """X-VLM's ViT and CLIP-ViT, and ALBEF's ViT."""
    clip = kind.trunk == "CLIP-ViT"
    dim, _, patch, _ = _shape(state, f"{kind.vision}patch_embed.{'weight' if clip else 'proj.weight'}", 4)
    positions = _shape(state, f"{kind.vision}pos_embed{'.weight' if clip else ''}", 2 if clip else 3)[-2] - 1
    blocks = f"{kind.vision}{'encoder.layers' if clip else 'blocks'}."
    depth = _count(state, re.escape(blocks))
    hidden = _shape(state, f"{blocks}0.mlp.fc1.weight")[0]
    size = math.isqrt(positions) * patch if image_size is None else image_size
    if size <= 0 or size % patch:
        raise ValueError(f"image size {size}: patches of {patch} pixels fill images of multiples of {patch}")
    found = {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": _heads(f"the {kind.trunk}", dim, heads),
        "mlp_ratio": hidden / dim if hidden % dim == 0 else (hidden + 0.5) / dim,  # timm rounds the product down
    }
    return VisionConfig(
        trunk="vit_base_patch16_clip_quickgelu_224" if clip else "vit_base_patch16_224",
        image_size=(size, size),
        options=_unlike(VIT_B, found),
        local_layers=0 if kind.albef else min(LOCAL_LAYERS, depth - 1),
    )


def _text(state: State, kind: Kind, heads: int | None) -> TextConfig:
    side = kind.text
    vocabulary, dim = _shape(state, f"{side}embeddings.word_embeddings.weight")
    layers = _count(state, rf"{re.escape(side)}encoder\.layer\.")
    fusing = sum(f"{side}encoder.layer.{n}.crossattention.self.query.weight" in state for n in range(layers))
    family = {"position_offset": 2, "norm_eps": 1e-5} if kind.roberta else {}
    return TextConfig(
        vocab_size=vocabulary,
        dim=dim,
        heads=_heads("the text side", dim, heads),
        feed_forward=_shape(state, f"{side}encoder.layer.0.intermediate.dense.weight")[0],
        text_layers=layers - fusing,
        cross_layers=fusing // kind.looks,
        looks=kind.looks,
        max_positions=_shape(state, f"{side}embeddings.position_embeddings.weight")[0],
        token_types=_shape(state, f"{side}embeddings.token_type_embeddings.weight")[0],
        **family,
    )


def _heads(what: str, dim: int, heads: int | None) -> int:
    if heads is None and dim % 64:
        raise ValueError(f"{what} is {dim} wide, not a multiple of 64: say how many attention heads it has (--heads)")
    if heads is not None and dim % heads:
        raise ValueError(f"{what} is {dim} wide, which {heads} attention heads do not share evenly")
    return heads or dim // 64


def _unlike(usual: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value != usual[key]}


def _shape(state: State, name: str, dims: int = 2) -> tuple[int, ...]:
    if name not in state or state[name].ndim != dims:
        raise ValueError(f"missing from the file: {name}, with {dims} dimensions")
    return tuple(state[name].shape)


def _count(state: State, pattern: str) -> int:
    """How many numbers follow a prefix: layers are counted from 0."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(rf"{pattern}(\d+)\.", name))), default=-1)
