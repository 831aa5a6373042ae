"""Where a model's weights come from before training: a folder of ours, or a trunk and a BERT, or nothing."""

import json
import logging

import torch

from xvlm import hub
from xvlm.config import Configured
from xvlm.models import convert, resize, schema
from xvlm.models.decoder import Captioner
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig, load_strictly, part_of

logger = logging.getLogger(__name__)

# What transformers calls those that are built as BERT is; MiniLM and other sentence encoders are among them.
BERTS = ("bert", "roberta", "xlm-roberta", "camembert")


class InitConfig(Configured):
    """Places as :func:`xvlm.hub.locate` understands them; what none names starts from random values."""

    # A whole model: a folder of ours or a hub name, also a captioner's. What it has and the configuration does not ask
    # for is left out; heads that it lacks start fresh, and a second look starts as a copy of the first (X-VLM's
    # ``load_pretrained``).
    # Where vision.image_size differs, windows may too, and position tables are resized.
    model: str | None = None
    fresh: tuple[str, ...] = ()  # parts that init.model lacks though its configuration has them: towers alone
    vision: str | None = None  # the trunk's weights: a file with timm's names, Swin's own, or the same tensors in order
    # A BERT-family folder: its first `text_layers` layers read, its last `cross_layers` fuse. Layers may do both, from
    # the same weights at the start: a sentence encoder such as MiniLM says what it means in its last layers only.
    text: str | None = None


def initial_model(config: XVLMConfig, init: InitConfig) -> tuple[XVLM, list[str]]:
    """Build a model and load what ``init`` names.

    Returns:
        The model, and the names of parameters that start fresh while others are pre-trained (X-VLM's
        ``init_params``: they learn at twice the rate); empty when everything starts fresh, or nothing does.

    Raises:
        ValueError: weights that do not fit the configuration, by name.
    """
    if init.model is not None:
        if init.vision is not None or init.text is not None:
            raise ValueError("init.model is a whole model; init.vision and init.text are for one that is put together")
        return _for_task(config, init.model, init.fresh)
    if init.fresh:
        raise ValueError("init.fresh names parts that init.model lacks, and there is no init.model")
    model = XVLM(config)
    loaded: dict[str, torch.Tensor] = {}
    if init.vision is not None:
        file = hub.locate(init.vision)
        state, target = convert.read_checkpoint(file), model.vision.trunk.state_dict()
        if any(name.endswith("relative_position_index") for name in state):  # as Swin's authors released it
            state = {name: tensor for name, tensor in convert.swin(state).items() if name in target}
        state = state if state.keys() == target.keys() else convert.in_order(state, target)
        loaded |= {f"vision.trunk.{name}": tensor for name, tensor in state.items()}
    if init.text is not None:
        loaded |= _text_weights(model, init.text)
        needed = (
            n for n, _ in model.named_parameters() if n.startswith(("text.", "cross.")) and "cross_attention" not in n
        )
        if missing := sorted(set(needed) - loaded.keys()):
            raise ValueError(f"init.text {init.text} lacks {missing}")
    load_strictly(model, model.state_dict() | loaded, [init.vision, init.text])
    return model, [name for name, _ in model.named_parameters() if name not in loaded] if loaded else []


def pretrained_model(name: str, fresh: tuple[str, ...] = ()) -> XVLM:
    """The weights that ``init.model`` names; a captioner's as those of a model whose one head guesses words."""
    place = hub.locate(name)
    if place.is_file() or schema.kind(place) != "Captioner":
        return XVLM.from_pretrained(name, fresh=fresh)
    captioner = Captioner.from_pretrained(name)
    config = XVLMConfig(vision=captioner.config.vision, text=captioner.config.text, heads=("word_head",))
    model = XVLM(config)
    load_strictly(model, convert.from_captions(captioner.state_dict()), name)
    return model


def _for_task(config: XVLMConfig, name: str, fresh: tuple[str, ...]) -> tuple[XVLM, list[str]]:
    pretrained = pretrained_model(name, fresh)
    theirs = pretrained.config
    looks = config.text.looks if theirs.text.looks == 1 else theirs.text.looks
    text, vision = theirs.text.model_copy(update={"looks": looks}), _at_size_of(config.vision, theirs.vision)
    reshaped = theirs.model_copy(update={"vision": vision, "text": text, "heads": config.heads})
    if reshaped != config:
        raise ValueError(f"init.model {name}: its configuration differs from model: {_difference(reshaped, config)}")
    state = pretrained.state_dict()
    if looks != theirs.text.looks:
        state = convert.for_looks(state, looks)
    model = XVLM(config)
    target = model.state_dict()
    if vision != theirs.vision:
        state, resized = resize.fit_tables(state, target, (pretrained.vision.grid, model.vision.grid))
        sizes = ["{} x {}".format(*each.image_size) for each in (theirs.vision, vision)]
        logger.warning("init.model %s: from %s to %s pixels, %d position tables resized", name, *sizes, len(resized))
    load_strictly(model, target | {part: tensor for part, tensor in state.items() if part in target}, name)
    return model, [part for part, _ in model.named_parameters() if part not in state or part_of(part) in fresh]


def _at_size_of(wanted: VisionConfig, known: VisionConfig) -> VisionConfig:
    """The ``known`` trunk with the image size that is ``wanted`` and, if it is another one, the windows for it."""
    if wanted.image_size == known.image_size:
        return known
    options = {key: value for key, value in known.options.items() if key != "window_size"}
    options |= {key: value for key, value in wanted.options.items() if key == "window_size"}
    return known.model_copy(update={"image_size": wanted.image_size, "options": options})


def _text_weights(model: XVLM, name: str) -> dict[str, torch.Tensor]:
    folder, text = hub.locate(name), model.config.text
    theirs = json.loads((folder / "config.json").read_text())
    if theirs.get("model_type") not in BERTS or theirs.get("hidden_act", "gelu") != "gelu":
        kind = f"{theirs.get('model_type')} with {theirs.get('hidden_act')}"
        raise ValueError(f"init.text {name} is a {kind}; expected one of {', '.join(BERTS)} with gelu")
    layers, heads = theirs["num_hidden_layers"], theirs["num_attention_heads"]
    fits = max(text.text_layers, text.cross_layers) <= layers <= text.text_layers + text.cross_layers
    if not fits or heads != text.heads:
        raise ValueError(
            f"init.text {name}: {layers} layers with {heads} heads, "
            f"but model.text asks for {text.text_layers} + {text.cross_layers} layers with {text.heads} heads"
        )
    offset = theirs["pad_token_id"] + 1 if theirs.get("model_type") != "bert" else 0
    if text.position_offset != offset:  # any offset would load: the tables have the same shape
        raise ValueError(
            f"init.text {name} is a {theirs.get('model_type')}: its first word has position {offset}, "
            f"but model.text.position_offset is {text.position_offset}"
        )
    if text.norm_eps != theirs["layer_norm_eps"]:  # which would load too
        raise ValueError(
            f"init.text {name} was made with norm_eps {theirs['layer_norm_eps']}, model.text says {text.norm_eps}"
        )
    weights = next((file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).exists()), None)
    if weights is None:
        raise ValueError(f"init.text {name}: {folder} holds neither model.safetensors nor pytorch_model.bin")
    state = convert.read_checkpoint(folder / weights)
    reads, fuses = convert.bert(state, text.text_layers), convert.bert(state, layers - text.cross_layers)
    cross = {name: tensor for name, tensor in fuses.items() if name.startswith("cross.")}
    return {name: tensor for name, tensor in reads.items() if not name.startswith("cross.")} | cross


def _difference(a: XVLMConfig, b: XVLMConfig) -> str:
    ours, theirs = a.model_dump(), b.model_dump()
    return "; ".join(f"{key}: {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
