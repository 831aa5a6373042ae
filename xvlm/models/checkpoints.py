"""Official checkpoint files: their weights under our names, as they are or as the start of another task's model.

An official file is a pickle of ``{"model": state dict, "config": the YAML it was trained with}`` or the bare state dict
(X-VLM, ``Pretrain.py`` and the fine-tuning scripts; ALBEF alike). Every tensor in it is accounted for: renamed,
resized, or dropped for a reason.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from xvlm import hub
from xvlm.models import convert, kinds, resize, schema
from xvlm.models.card import Card
from xvlm.models.decoder import Answerer, AnswererConfig, Captioner, CaptionerConfig
from xvlm.models.kinds import Config, Kind
from xvlm.models.xvlm import XVLM, Pretrained, load_strictly, misfits
from xvlm.prose import counted

State = dict[str, Tensor]
Rename = Callable[[State], State]

MODELS: dict[str, type[Pretrained]] = {model.__name__: model for model in (XVLM, Answerer, Captioner)}
# The kinds of files that start a task's model, as the reference's loaders have it.
STARTS = dict.fromkeys(("retrieval", "grounding", "vqa", "captioning", "nlvr_pretraining"), ("pretraining",))
STARTS |= {"nlvr": ("pretraining", "nlvr_pretraining")}

_SECOND_NAME = "the second name of a tied tensor"
# Why a tensor of the file has no place in ours, by the end of its name.
_DROPPED = {
    r"relative_position_index|attn_mask": "rebuilt from image and window size",
    r"position_ids": "rebuilt, it counts",
    r"(cls\.predictions|lm_head)\.decoder\.(weight|bias)": _SECOND_NAME,
    r"crossattention\.self\.(key|value)\.(weight|bias)": _SECOND_NAME,
    r"pooler\..*|cls\.seq_relationship\..*": "BERT's own, X-VLM does not use it",
    r"^\w+_m\..*": "an averaged copy, which only training needs",
    r"^((image|text|idx)_queue|queue_ptr)": "features of past batches, which only training needs",
}


@dataclass(frozen=True)
class Converted:
    """A checkpoint as ours, and what became of each tensor of the file."""

    kind: Kind
    config: Config
    state: State
    renamed: dict[str, tuple[str, ...]]  # of the file -> ours; several where a layer starts several
    dropped: dict[str, str]  # of the file -> why
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # ours -> shape before, shape after
    fresh: list[str]  # ours that no tensor of the file starts
    trained_with: dict[str, Any]  # the configuration in the file, empty where there is none

    def lines(self) -> list[str]:
        """What was renamed, dropped, resized and started fresh; what differs only in a layer's number shares a line."""
        groups: dict[str, int] = {}
        said = [f"renamed {name} -> {', '.join(new)}" for name, new in self.renamed.items()]
        said += [f"dropped {name}: {why}" for name, why in self.dropped.items()]
        for name, (before, after) in self.resized.items():
            said.append(f"resized {name}: {' x '.join(map(str, before))} -> {' x '.join(map(str, after))}")
        said += [f"started fresh {name}" for name in self.fresh]
        for line in said:
            line = re.sub(r"\.\d+(?=\.)", ".*", line)
            groups[line] = groups.get(line, 0) + 1
        return [line + (f" ({tensors})" if tensors > 1 else "") for line, tensors in groups.items()]


def load(path: Path | str) -> Pretrained:
    """The model in an official file or in a folder of ours, whichever it is, in evaluation mode.

    Raises:
        ValueError: as :func:`read`, or as :meth:`xvlm.XVLM.from_pretrained`.
    """
    if Path(path).is_dir():
        kind = schema.kind(Path(path))
        if kind not in MODELS:
            raise ValueError(f"{path}: holds a model of kind {kind}; known are {', '.join(MODELS)}")
        return MODELS[kind].from_pretrained(path)
    return build(read(path), path)


def build(converted: Converted, origin: object) -> Pretrained:
    model = _make(converted.config)
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name in converted.fresh}
    load_strictly(model, fresh | converted.state, origin)
    return model.eval()


def _make(config: Config) -> Pretrained:
    return next(model for model in MODELS.values() if model.Config is type(config))(config)


def read(
    path: Path | str, *, image_size: int | None = None, heads: int | None = None, task: str | None = None
) -> Converted:
    """Read an official file; nothing in it is run.

    Args:
        image_size: height and width in pixels; position tables are resized. The file's own if not given.
        heads: attention heads of the text side and of a ViT, which no tensor tells; one per 64 dimensions if not given.
        task: one of :data:`xvlm.models.kinds.TASKS`, whose model the file starts (see :data:`STARTS`). The file's own
            if not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, of no kind known, or of one that does not start ``task``; a tensor is
            left over, missing, misshapen or not finite, by name; the trunk does not take the image size.
    """
    content = convert.read_file(path)
    trained_with = content.get("config") if isinstance(content, dict) else None
    try:
        return official(
            convert.state_of(content, path),
            image_size=image_size,
            heads=heads,
            task=task,
            trained_with=trained_with if isinstance(trained_with, dict) else {},
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def official(
    state: State,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    task: str | None = None,
    trained_with: dict[str, Any] | None = None,
) -> Converted:
    """An official state dict as ours.

    Args and errors: as :func:`read`.
    """
    kind = kinds.kind(state)
    config = kinds.config(state, kind, image_size=image_size, heads=heads)
    rename = partial(convert.official, text_layers=config.text.text_layers, looks=config.text.looks)
    ours, target = rename(state), _target(config)
    renamed = _places(state, rename)
    dropped, unknown = _dropped([name for name in state if name not in renamed])
    left = sorted(unknown + [name for name, new in renamed.items() if not target.keys() >= set(new)])
    missing = [name for name in target if name not in ours]
    if left or missing:
        parts = [f"left over in the file: {', '.join(left)}"] * bool(left)
        parts += [f"missing from the file: {', '.join(missing)}"] * bool(missing)
        raise ValueError(f"of kind {kind}, but {'; '.join(parts)}")
    _check_tied(state, config)
    fitted, changed = resize.fit_tables(ours, target)
    if wrong := misfits(target, fitted):
        raise ValueError("; ".join(wrong))
    resized = {name: (tuple(ours[name].shape), tuple(fitted[name].shape)) for name in changed}
    fresh: list[str] = []
    if task not in (None, kind.task):
        config, start = _start(kind, config, task)
        target, started = _target(config), start(fitted)
        fitted = {name: started[name] for name in target if name in started}
        fresh = [name for name in target if name not in started]
        used = _places(state, lambda theirs: {n: t for n, t in start(rename(theirs)).items() if n in target})
        dropped |= {name: f"a {task} model has no place for it" for name in renamed if name not in used}
        renamed = used
    return Converted(kind, config, fitted, renamed, dropped, resized, fresh, trained_with or {})


def _target(config: Config) -> State:
    with torch.device("meta"):  # shapes only: nothing is allocated before everything is known to fit
        return _make(config).state_dict()


def _start(kind: Kind, config: Config, task: str) -> tuple[Config, Rename]:
    """The configuration of a task's model, and what its state dict takes from the pre-trained one."""
    if task not in kinds.TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(kinds.TASKS)}")
    if kind.task not in STARTS.get(task, ()):
        starts = " or ".join(STARTS.get(task, ())) or "none but its own"
        raise ValueError(f"this is a checkpoint of kind {kind}; a {task} model starts from {starts}")
    vision, text = config.vision, config.text
    if task == "captioning":
        return CaptionerConfig(vision=vision, text=text), convert.for_captions
    if task == "vqa":
        layers = text.cross_layers
        out, into = _target(config)["cross.layers.0.cross_attention.key.weight"].shape
        start = partial(convert.for_answers, decoder_layers=layers, same_width=out == into)
        return AnswererConfig(vision=vision, text=text, decoder_layers=layers), start
    looks = kinds.LOOKS.get(task, 1)
    text = text.model_copy(update={"looks": looks})
    config = config.model_copy(update={"text": text, "heads": kinds.HEADS[task]})
    return config, partial(convert.for_looks, looks=looks // kind.looks)


def _places(state: State, rename: Rename) -> dict[str, tuple[str, ...]]:
    """Where each tensor goes, by name; those that go nowhere are left out."""
    names = list(state)
    numbered = {name: torch.tensor([i]) for i, name in enumerate(names)}  # the rules look at names alone
    found: dict[str, list[str]] = {name: [] for name in names}
    for new, numbers in rename(numbered).items():
        for i in numbers.flatten().tolist():
            found[names[i]].append(new)
    return {name: tuple(new) for name, new in found.items() if new}


def _dropped(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> why it has no place, and the names for which there is no reason."""
    why = {name: next((why for end, why in _DROPPED.items() if re.search(rf"({end})$", name)), "") for name in names}
    return {name: reason for name, reason in why.items() if reason}, [name for name in why if not why[name]]


def _check_tied(state: State, config: Config) -> None:
    """Two names of one tensor are stored as two: they must be equal for one to be enough."""
    for name, tensor in state.items():
        if not name.startswith(("text_encoder.", "text_decoder.")):
            continue
        first = None
        if head := re.match(r"(text_\w+\.)(cls\.predictions|lm_head)\.decoder\.(weight|bias)$", name):
            words = (f"{head[1]}{inner}embeddings.word_embeddings.weight" for inner in ("bert.", "roberta.", ""))
            first = f"{head[1]}{head[2]}.bias" if head[3] == "bias" else next(n for n in words if n in state)
        elif layer := re.match(r"(.*\.layer\.)(\d+)(\.crossattention\.self\.(?:key|value)\..*)", name):
            second = (int(layer[2]) - config.text.text_layers) % config.text.looks
            first = f"{layer[1]}{int(layer[2]) - second}{layer[3]}" if second else None
        if first and not torch.equal(tensor, state[first]):
            raise ValueError(f"{name} differs from {first}, to which it should be tied")


def card(source: Path, converted: Converted) -> Card:
    """What a converted file says of itself."""
    about = ""
    if converted.resized:
        about += f"{counted(len(converted.resized), 'position table')} resized: fine-tune before comparing numbers. "
    if converted.fresh:
        about += f"{counted(len(converted.fresh), 'tensor')} started fresh: to be trained before use."
    data = "The file does not say what it was trained on."
    if converted.trained_with:
        plain = json.loads(json.dumps(converted.trained_with, default=str))  # only what YAML can say safely
        data = f"The configuration stored in the file:\n\n```yaml\n{yaml.safe_dump(plain)}```"
    return Card(
        about=about.strip(),
        origin=f"`xvlm convert` made it from the official checkpoint `{source.name}`, SHA-256 `{hub.sha256(source)}`.",
        data=data,
        licence="That of the checkpoint. The repositories of X-VLM and ALBEF, which link the official ones, are under "
        "BSD-3-Clause.",
        numbers="None were measured after the conversion; published ones are those of the fine-tuned models.",
    )
