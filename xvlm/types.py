"""What travels between the parts: texts, regions, batches, image concepts, word states, groundings."""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Movable:
    """Moves every tensor of a dataclass, nested ones too."""

    def to(self, device: torch.device | str):
        def move(value):
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return value.to(device) if isinstance(value, Movable) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Texts(Movable):
    """Token ids, [CLS] first; ``mask`` is true on tokens, false on padding."""

    ids: Int[Tensor, "text word"]
    mask: Bool[Tensor, "text word"]


@dataclass(frozen=True)
class Masked(Movable):
    """The same texts with words hidden: replaced ids, and where (true) the original id is to be guessed."""

    ids: Int[Tensor, "text word"]
    hidden: Bool[Tensor, "text word"]


@dataclass(frozen=True)
class Regions(Movable):
    """What each text is about: an image of the batch, and in it a box. A caption's box is the whole image."""

    image: Int[Tensor, "text"]
    boxes_cxcywh: Float[Tensor, "text 4"]  # normalised to the image
    boxes_xywh: Float[Tensor, "text 4"]  # pixels of the image; decides patches (see boxes.patch_mask)
    whole: Bool[Tensor, "text"]  # true: about the whole image, has no box to predict

    @classmethod
    def whole_images(cls, image: Int[Tensor, "text"], size: tuple[int, int]) -> "Regions":
        """Texts about all of an image of ``size`` (height, width) each."""
        boxes_cxcywh = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(image), 1)
        boxes_xywh = torch.tensor([0.0, 0.0, size[1], size[0]]).repeat(len(image), 1)
        return cls(image, boxes_cxcywh, boxes_xywh, torch.ones(len(image), dtype=torch.bool))


@dataclass(frozen=True)
class Batch(Movable):
    """Images and the texts about them. ``ids`` name the records (image by image), ``skipped`` the broken ones.

    ``seen`` counts images and texts by source and kind: ``coco/images``, ``coco/captions``, ``coco/objects``.
    ``places`` are the images' places in the order of the whole run: the same on any number of processes.
    """

    images: Float[Tensor, "image 3 height width"]
    texts: Texts
    regions: Regions
    masked: Masked | None = None
    ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    seen: dict[str, int] = field(default_factory=dict)
    places: Int[Tensor, "image"] | None = None


@dataclass(frozen=True)
class Concepts(Movable):
    """Images, regions and objects ready to be looked at: X-VLM's visual concepts.

    Patches are stored once per row (an image; a region only where a ViT re-encodes it) and concepts point at them, so
    that a hundred regions of an image share its patches. A concept's tokens are ``[pooled, patches it may see]``.
    """

    patches: Float[Tensor, "row patch dim"]
    pooled: Float[Tensor, "concept dim"]
    row: Int[Tensor, "concept"]
    mask: Bool[Tensor, "concept patch"]
    grid: tuple[int, int]

    def take(self, index: Int[Tensor, "chosen"]) -> "Concepts":
        """The chosen concepts; patches stay where they are."""
        return replace(self, pooled=self.pooled.index_select(0, index), row=self.row[index], mask=self.mask[index])


@dataclass(frozen=True)
class Words(Movable):
    """Contextual word states, packed: only the words in ``mask`` (text, word) are stored, text after text."""

    states: Float[Tensor, "token dim"]
    mask: Bool[Tensor, "text word"]

    @property
    def starts(self) -> Int[Tensor, "text"]:
        """Row of ``states`` at which each text begins."""
        lengths = self.mask.sum(1)
        return lengths.cumsum(0) - lengths

    @property
    def first(self) -> Float[Tensor, "text dim"]:
        """State of each text's first stored word, [CLS].

        Raises:
            ValueError: no word of a text is stored. A GPU, which would have to wait to be asked, fails in its kernel.
        """
        without = ~self.mask.any(1)
        if self.mask.device.type == "cpu" and without.any():
            raise ValueError(f"no word of text {int(without.nonzero()[0])} of {len(without)} is stored")
        return self.states.index_select(0, self.starts.masked_fill(without, len(self.states)))

    @property
    def beginnings(self) -> Bool[Tensor, "text word"]:
        """True on each text's first word, [CLS]: what most questions want to know."""
        return F.pad(torch.ones_like(self.mask[:, :1]), (0, self.mask.shape[1] - 1))

    @property
    def mean(self) -> Float[Tensor, "text dim"]:
        """Mean state of each text's stored words, in float32."""
        text = self.mask.nonzero()[:, 0]
        total = torch.zeros(len(self.mask), self.states.shape[-1], device=self.states.device)
        return total.index_add_(0, text, self.states.float()) / self.mask.sum(1, keepdim=True)

    def padded(self) -> Float[Tensor, "text word dim"]:
        """States in the padded layout, zeros on padding."""
        out = self.states.new_zeros(*self.mask.shape, self.states.shape[-1])
        return out.masked_scatter(self.mask[..., None], self.states)

    def take(self, index: Int[Tensor, "chosen"]) -> "Words":
        """The chosen texts, repeats allowed."""
        mask = self.mask[index]
        offset = (mask.cumsum(1) - 1)[mask]
        start = self.starts[index].repeat_interleave(mask.sum(1))
        return Words(self.states.index_select(0, start + offset), mask)


@dataclass(frozen=True)
class Proposals(Movable):
    """Boxes of one image among which a grounder may choose, in pixels; ``size`` is the image's width and height.

    ``scores`` are the proposer's confidences, ones where it has none; ``labels`` what it takes the boxes for.
    """

    boxes_xyxy: Float[Tensor, "box 4"]
    scores: Float[Tensor, "box"]
    size: tuple[int, int]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grounded(Movable):
    """What every grounder returns for one phrase: boxes in pixels of the image given, best first.

    ``presence`` is the probability that the phrase is in the image at all, where the method has one; ``heat`` where the
    method looked, over the grid of patches; ``phrase`` what a :class:`xvlm.grounder.Grounder` was asked.
    """

    boxes_xyxy: Float[Tensor, "box 4"]
    scores: Float[Tensor, "box"]
    presence: float | None = None
    masks: Bool[Tensor, "box height width"] | None = None
    heat: Float[Tensor, "row column"] | None = None
    phrase: str = ""
