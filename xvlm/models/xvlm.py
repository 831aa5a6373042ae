"""XVLM: three verbs (encode_image, encode_text, fuse), the projections and the pre-training heads."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from xvlm import boxes, hub
from xvlm.config import Configured
from xvlm.models import convert, golden, schema
from xvlm.models.card import Card, write_card
from xvlm.models.text import Count, CrossEncoder, TextConfig, TextEncoder
from xvlm.models.vision import VisionConfig, VisionEncoder, regions_in_pixels
from xvlm.types import Concepts, Regions, Texts, Words

# What is read off the verbs' results, by the names of the parts; a model has those its task uses.
PretrainingHead = Literal["image_projection", "text_projection", "temperature", "itm_head", "box_head", "word_head"]
PRETRAINING_HEADS: tuple[PretrainingHead, ...] = get_args(PretrainingHead)
Model = TypeVar("Model", bound="Pretrained")

_UNKNOWN = Card()

logger = logging.getLogger(__name__)


class XVLMConfig(Configured):
    """Shape of the model; with the defaults, the published X-VLM base model (215,637,241 parameters)."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: Count = 256  # of the space in which images and texts are compared
    temperature: float = 0.07
    # What of a text is embedded: its [CLS], as X-VLM does, or the mean of its words, for encoders that were trained so
    # (MiniLM and other sentence encoders, whose [CLS] is nearly the same for every text).
    text_pooling: Literal["first", "mean"] = "first"
    matching: Literal["mlp", "linear"] = "mlp"  # what itm_head is; ALBEF's is a single matrix
    heads: tuple[PretrainingHead | Literal["truth_head", "assignment_head"], ...] = PRETRAINING_HEADS


class Head(nn.Sequential):
    """X-VLM's head (``build_mlp``): Linear to twice the width, LayerNorm, GELU, Linear."""

    def __init__(self, dim: int, out: int):
        super().__init__(nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, out))


class WordHead(nn.Module):
    """BERT's masked-word head; its last matrix is the word embedding, passed in so that it is stored once."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, states: Float[Tensor, "hole dim"], vocabulary: Float[Tensor, "word dim"]
    ) -> Float[Tensor, "hole word"]:
        return F.linear(self.norm(F.gelu(self.dense(states))), vocabulary, self.bias)


class Pretrained(nn.Module):
    """A model that is kept in a folder or on the hub: weights, their shape, and what they answer to a fixed input."""

    Config: ClassVar[type[Configured]]
    config: Any  # a Config

    def answers(
        self, images: Float[Tensor, "image 3 height width"], regions: Regions, texts: Texts
    ) -> dict[str, Tensor]:
        """What :mod:`xvlm.models.golden` keeps, by name: every part of the model is to be heard in it."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype = torch.float32, card: Card = _UNKNOWN) -> None:
        """Write ``config.json``, ``model.safetensors``, ``golden.safetensors`` and the card, ``README.md``.

        Golden outputs are what the written weights, read back, answer to a fixed input: see :mod:`xvlm.models.golden`.

        Args:
            dtype: float16 halves the size.
            card: what is known of the weights; one that was written or edited by hand is kept.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        schema.write(self.config, type(self).__name__, folder)
        state = {name: _as(dtype, tensor) for name, tensor in self.state_dict().items()}
        with hub.replacing(folder / "model.safetensors") as unfinished:
            save_file(state, unfinished, metadata={"format": "pt"})
        with torch.random.fork_rng(devices=[]):  # building a model draws numbers; saving one should not be noticed
            golden.write(type(self).from_pretrained(folder), folder)
        write_card(self, folder, card)

    def push_to_hub(self, name: str, *, private: bool = False, card: Card = _UNKNOWN) -> str:
        """Save to the repository ``org/name`` of the hub, which is made where it does not exist; returns its address.

        Args:
            card: as :meth:`save_pretrained` takes it.

        Raises:
            OSError: the hub refused, with its reason.
        """
        named = replace(card, name=card.name or name)
        return hub.push_saved(partial(self.save_pretrained, card=named), name, private=private)

    @classmethod
    def from_pretrained(cls: type[Model], name: Path | str, *, fresh: Sequence[str] = ()) -> Model:
        """Load a folder written by :meth:`save_pretrained`, by path, shipped name (``xvlm-scenes-tiny``) or hub name.

        Folders of older schemas load too, see :mod:`xvlm.models.schema`. The path may also be an official checkpoint
        file (``….th``), see :mod:`xvlm.models.checkpoints`.

        Args:
            fresh: parts (``cross``, ``itm_head``, …) that the weights lack and that start from random values, which the
                log says; for weights that hold the towers alone.

        Raises:
            FileNotFoundError: no such folder, or a file missing in it.
            ValueError: the folder holds another kind of model; a config field or tensor that is missing, unexpected, of
                another shape or not finite, by name; a part that is missing and not in ``fresh``, or in ``fresh`` and
                not missing.
        """
        folder = hub.locate(name)
        if folder.is_file():
            from xvlm.models import checkpoints  # which builds on this module

            if fresh:
                raise ValueError(f"{folder}: an official file is loaded whole; fresh is for folders")
            model = checkpoints.load(folder)
            if not isinstance(model, cls):
                raise ValueError(schema.another(folder, type(model).__name__, cls.__name__))
            return model
        model = cls(schema.read(cls.Config, cls.__name__, folder))
        file = folder / "model.safetensors"
        state = convert.read_checkpoint(file)
        load_strictly(model, state | _fresh(model, state, fresh, file), file)
        return model.eval()


class XVLM(Pretrained):
    """A vision-language model of images, regions and objects (X-VLM, arXiv 2111.08276)."""

    Config = XVLMConfig

    def __init__(self, config: XVLMConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextEncoder(config.text)
        self.cross = CrossEncoder(config.text, self.vision.dim)
        self.word_head = WordHead(config.text)
        for part in (self.text, self.cross, self.word_head):
            part.apply(initialise_like_bert)
        self.image_projection = nn.Linear(self.vision.dim, config.embed_dim)
        self.text_projection = nn.Linear(config.text.dim, config.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = Head(config.text.dim, 2) if config.matching == "mlp" else nn.Linear(config.text.dim, 2)
        self.box_head = Head(config.text.dim, 4)
        # Built and dropped, so that the same seed gives the same weights whichever heads there are.
        for unused in set(PRETRAINING_HEADS) - set(config.heads):
            delattr(self, unused)
        if "truth_head" in config.heads:
            self.truth_head = Head(config.text.dim, 2)
        if "assignment_head" in config.heads:
            self.assignment_head = nn.Linear(config.text.dim, 3)

    # The three verbs.

    def encode_image(self, images: Float[Tensor, "image 3 height width"], regions: Regions | None = None) -> Concepts:
        """Images as concepts, in order; with ``regions``, one more concept for each of them, in order, behind."""
        return self.vision(images, regions)

    def encode_text(self, texts: Texts) -> Words:
        """Contextual word states that have not seen an image."""
        return self.text(texts)

    def fuse(
        self,
        words: Words,
        concepts: Concepts,
        about: Int[Tensor, "question"] | Int[Tensor, "question look"],
        of: Int[Tensor, "question"] | None = None,
        only: Bool[Tensor, "question word"] | None = None,
        *,
        keep_map: int | None = None,
    ) -> Words:
        """Word states after looking at a concept each: question ``q`` shows text ``of[q]`` the concept ``about[q]``.

        Several questions to the same images (right pairs, wrong pairs, hidden words, boxes) are one call with a longer
        list: patches are projected once, whoever looks.

        Args:
            about: a concept for each question, or as many as ``text.looks`` says.
            of: which text each question is about; text ``q`` if not given.
            only: the words whose states are wanted (all if not given); the last layer is computed for them alone.
            keep_map: number of the cross layer whose attention, (token, head, 1 + patch) with gradient, is kept in
                ``cross.layers[n].cross_attention`` until ``take_map()``.
        """
        return self.cross(words, concepts, about, of, only, keep_map=keep_map)

    # What is read off their results.

    def embed_image(self, concepts: Concepts) -> Float[Tensor, "concept embed"]:
        """Unit vectors of concepts, comparable with :meth:`embed_text` by their dot product."""
        return F.normalize(self.image_projection(concepts.pooled), dim=-1)

    def embed_regions(
        self, pixel_values: Float[Tensor, "3 height width"], boxes_xyxy: Float[Tensor, "box 4"]
    ) -> Float[Tensor, "box embed"]:
        """Unit vectors of boxes of one image, comparable with :meth:`embed_text`; thousands of them in one pass.

        A ViT with ``local_layers`` runs its last blocks for each box: there, memory grows with the boxes' patches.

        Args:
            pixel_values: as :meth:`xvlm.Processor.pixel_values` gives them.
            boxes_xyxy: in pixels of ``pixel_values``, so that an edge on the border between patches stays on it.
                Those of the image before resizing are multiplied by the two sizes' ratio, and cut where they leave
                the image, by :func:`xvlm.boxes.clip`.

        Raises:
            ValueError: a box that leaves the image, is empty or not finite; the first such box, by number.
        """
        height, width = pixel_values.shape[1:]
        boxes.check_inside(boxes_xyxy, width, height)
        count, device = len(boxes_xyxy), pixel_values.device
        image = torch.zeros(count, dtype=torch.long, device=device)
        regions = regions_in_pixels(boxes_xyxy.to(device), image, (height, width))
        concepts = self.encode_image(pixel_values[None], regions)
        return self.embed_image(concepts.take(1 + torch.arange(count, device=device)))

    def embed_text(self, words: Words) -> Float[Tensor, "text embed"]:
        """Unit vectors of texts."""
        pooled = words.first if self.config.text_pooling == "first" else words.mean
        return F.normalize(self.text_projection(pooled), dim=-1)

    def match(self, fused: Words) -> Float[Tensor, "text 2"]:
        """Logits that text and concept do not (0) or do (1) belong together."""
        return self.itm_head(fused.first)

    def locate(self, fused: Words) -> Float[Tensor, "text 4"]:
        """Box of what each text says, ``cxcywh`` normalised to the image; fuse with whole images for this."""
        with torch.autocast(fused.states.device.type, enabled=False):  # coordinates need more digits than bfloat16 has
            return self.box_head(fused.first.float()).sigmoid()

    def judge(self, fused: Words) -> Float[Tensor, "text 2"]:
        """Logits that a statement is false (0) or true (1) of the two images it was shown."""
        return self.truth_head(fused.first)

    def assign(self, fused: Words) -> Float[Tensor, "text 3"]:
        """Logits that a text is about the first (0), the second (1) or neither (2) of the two images it was shown."""
        return self.assignment_head(fused.first)

    def guess_words(self, states: Float[Tensor, "hole dim"]) -> Float[Tensor, "hole word"]:
        """Logits over the vocabulary for hidden words."""
        return self.word_head(states, self.text.words.weight)

    def answers(
        self, images: Float[Tensor, "image 3 height width"], regions: Regions, texts: Texts
    ) -> dict[str, Tensor]:
        """Fused states; and by the heads there are, unit vectors of images, regions and texts, logits and boxes."""
        concepts, words = self.encode_image(images, regions), self.encode_text(texts)
        # Questions: both texts about the whole image, and about a box each; a second look is at the next concept.
        about = (torch.tensor([0, 0, 1, 2])[:, None] + torch.arange(self.config.text.looks)) % 3
        fused = self.fuse(words, concepts, about, torch.tensor([0, 1, 0, 1]))
        found = {"fused": fused.first}
        readings = {
            "image_projection": ("image_embedding", lambda: self.embed_image(concepts)),
            "text_projection": ("text_embedding", lambda: self.embed_text(words)),
            "itm_head": ("matching", lambda: self.match(fused)),
            "box_head": ("boxes_cxcywh", lambda: self.locate(fused)),
            "word_head": ("words", lambda: golden.sample(self.guess_words(fused.first))),
            "truth_head": ("truth", lambda: self.judge(fused)),
            "assignment_head": ("assignment", lambda: self.assign(fused)),
        }
        return found | {name: read() for head, (name, read) in readings.items() if head in self.config.heads}


def load_strictly(model: nn.Module, state: dict[str, Tensor], origin: object) -> None:
    """Copy a state dict into a model; every tensor must find its place and every place its tensor.

    Raises:
        ValueError: names every missing, unexpected and misshapen tensor, and those that are not finite.
    """
    own = model.state_dict()
    if wrong := misfits(own, state):
        raise ValueError(f"{origin}: " + "; ".join(wrong))
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def misfits(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What keeps a state dict from being loaded where ``own`` (its values are not looked at) is, in words."""
    wrong = [f"missing {name}" for name in own.keys() - state.keys()]
    wrong += [f"unexpected {name}" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            wrong.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
        elif not state[name].is_meta and not state[name].isfinite().all():
            wrong.append(f"{name} holds NaN or infinite values")
    return sorted(wrong)


def part_of(name: str) -> str:
    """``cross`` of ``cross.layers.0.norm.bias``."""
    return name.partition(".")[0]


def _fresh(model: nn.Module, state: dict[str, Tensor], fresh: Sequence[str], file: Path) -> dict[str, Tensor]:
    """The model's own values for the parts in ``fresh``, which must be all that a state dict holds nothing of."""
    own = model.state_dict()
    absent = {part_of(name) for name in own} - {part_of(name) for name in state}
    if unnamed := sorted(absent - set(fresh)):
        others = misfits({name: tensor for name, tensor in own.items() if part_of(name) not in absent}, state)
        hint = f"fresh={sorted(absent)} would start what is missing from random values"
        raise ValueError(f"{file}: " + "; ".join([f"missing all of {', '.join(unnamed)}", *others, hint]))
    if needless := sorted(set(fresh) - absent):
        raise ValueError(f"{file}: {', '.join(needless)} in fresh, but only parts that the weights lack can be")
    if absent:
        logger.warning("%s: these start from random values: %s", file, ", ".join(sorted(absent)))
    return {name: tensor for name, tensor in own.items() if part_of(name) in absent}


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def initialise_like_bert(module: nn.Module) -> None:
    """Normal(0, 0.02) matrices and zero biases; for :meth:`torch.nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
