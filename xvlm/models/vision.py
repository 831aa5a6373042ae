"""The patch encoder: any timm trunk sees an image once, and any box pools its patches into a concept."""

import difflib
import math
from dataclasses import replace
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xvlm import boxes
from xvlm.config import Configured
from xvlm.models.packing import Packing, Page
from xvlm.types import Concepts, Regions


class VisionConfig(Configured):
    """Which timm model, at which size, and how boxes become concepts. The default is X-VLM's Swin-B.

    X-VLM's ViT is ``vit_base_patch16_224``, its CLIP-ViT ``vit_base_patch16_clip_quickgelu_224``, both with
    ``local_layers: 4``.
    """

    trunk: str = "swin_base_patch4_window7_224"
    options: dict[str, Any] = {}  # further arguments of timm.create_model, e.g. output_stride: 16
    image_size: tuple[int, int] = (224, 224)  # height, width
    pooling: Literal["hard", "soft"] = "hard"  # soft weighs a patch by the share of it that the box covers
    local_layers: int = Field(0, ge=0)  # a ViT's last blocks that see each region alone, instead of its pooled patches
    positions: bool = False  # normalise patches and add 2-D positions: for trunks that carry none, not X-VLM's
    freeze_statistics: bool = False  # keep BatchNorm's running statistics, as one does with pre-trained trunks

    @model_validator(mode="after")
    def _regions_are_pooled_or_encoded(self) -> "VisionConfig":
        if self.local_layers and self.pooling == "soft":
            raise ValueError("with local_layers a region is its class token, nothing is pooled: leave pooling at hard")
        return self


class VisionEncoder(nn.Module):
    """A timm trunk and the adapter around it (X-VLM section 3.1).

    The whole image's pooled token is what the trunk was made to pool: its class token, or the mean of its patches where
    it has none or averages for its classifier (Swin, BEiT, EVA-02, DINOv3, SigLIP; with ``options: {global_pool:
    token}`` those that have a class token pool it). A region's pooled token is the mean over the patches its box
    touches and it shares the image's patches, or with ``local_layers`` the last blocks run once more for it, on the
    class token and the patches its box touches alone, and it has a class token and a row of patches of its own
    (reference ``models/vit.py``).

    Parameters of the trunk's own head (attention pooling, the norm of a ConvNeXt's head) stay, so that timm's weights
    fit, but do not learn: nothing of them reaches the patches.

    Raises:
        ValueError: no such trunk; options or an image size that it cannot have; a trunk without a map of patches, or
            whose patches do not divide the image evenly.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.trunk = _create_trunk(config)
        features = self._probe()
        self.channels_first = features.ndim == 4 and getattr(self.trunk, "output_fmt", "NCHW") != "NHWC"
        self.dim = features.shape[1 if self.channels_first else -1]
        self.grid = self._grid(features)
        self.prefix = features.shape[1] - math.prod(self.grid) if features.ndim == 3 else 0
        self.pools_class_token = self._pools_class_token()
        reached = _parameters_behind(self._normed(features))
        for parameter in self.trunk.parameters():
            parameter.requires_grad_(parameter in reached)
        if config.local_layers:
            self._check_local_layers()
        if config.positions:
            self.norm = nn.LayerNorm(self.dim)
            self.positions = nn.Parameter(_sine_positions(*self.grid, self.dim))
        self.train()  # as modules begin, but with the statistics that stay as they are

    def _probe(self) -> Tensor:
        """What the trunk gives for one image: shapes differ between families, and no attribute tells them all."""
        was_training = self.trunk.training
        try:
            with torch.enable_grad():
                features = self.trunk.eval().forward_features(torch.zeros(1, 3, *self.config.image_size))
        except Exception as error:  # each family has its own way to say that a size does not fit its windows
            raise ValueError(_refusal(self.config, f"{type(error).__name__} {error}".strip())) from error
        self.trunk.train(was_training)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError(_refusal(self.config, "it gives no map of patches"))
        return features

    def _grid(self, features: Tensor) -> tuple[int, int]:
        stride = self.trunk.feature_info[-1]["reduction"]
        rows, columns = (math.ceil(side / stride) for side in self.config.image_size)
        if features.ndim == 4:
            rows, columns = (int(n) for n in (features.shape[2:] if self.channels_first else features.shape[1:3]))
        elif (tokens := features.shape[1]) - rows * columns not in self._possible_prefixes():
            raise ValueError(_refusal(self.config, f"{tokens} tokens are no map of {rows} x {columns} patches"))
        if (rows * stride, columns * stride) != self.config.image_size:  # boxes would be given patches beside their own
            raise ValueError(
                _refusal(self.config, f"{rows} x {columns} patches of {stride} x {stride} pixels do not cover them")
            )
        return rows, columns

    def _possible_prefixes(self) -> tuple[int, ...]:
        known = getattr(self.trunk, "num_prefix_tokens", None)
        return (0, 1) if known is None else (known,)

    def _pools_class_token(self) -> bool:
        """Whether the first token stands for the image; it may be a register, or averaging may be what was trained."""
        has_one = self.prefix > 0 and getattr(self.trunk, "cls_token", None) is not None
        return has_one and getattr(self.trunk, "global_pool", "token") == "token"

    def train(self, mode: bool = True) -> "VisionEncoder":
        """A BatchNorm keeps its running statistics where its own weights do not learn, and all do by configuration."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                frozen = self.config.freeze_statistics or not all(p.requires_grad for p in module.parameters())
                module.train(mode and not frozen)
        return self

    def _check_local_layers(self) -> None:
        local = self.config.local_layers
        if not isinstance(self.trunk, VisionTransformer) or not self.pools_class_token:
            raise ValueError(f"vision.local_layers needs a ViT with a class token, {self.config.trunk} is none")
        if local >= len(self.trunk.blocks):
            raise ValueError(f"vision.local_layers is {local}, {self.config.trunk} has {len(self.trunk.blocks)} blocks")

    def forward(self, images: Float[Tensor, "image 3 height width"], regions: Regions | None = None) -> Concepts:
        """The images as concepts 0 … image-1; with ``regions``, theirs follow in order."""
        if images.shape[2:] != self.config.image_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.config.image_size}")
        if not len(images):
            raise ValueError("there are no images to encode")
        local = self.config.local_layers
        features, shared = self._features_and_shared(images) if local else (self.trunk.forward_features(images), None)
        patches, whole = self._tokens(features)
        row = torch.arange(len(images), device=images.device)
        everything = torch.ones(patches.shape[:2], dtype=torch.bool, device=images.device)
        seen = Concepts(patches, whole, row, everything, self.grid)
        if regions is None:
            return seen
        if not local:
            return self.with_regions(seen, regions)
        mask = self._patches_of(regions)
        pooled, region_row = whole[regions.image], regions.image
        if len(part := (~regions.whole).nonzero()[:, 0]):  # the others are the image, which has been encoded
            own_patches, own_pooled = self._tokens(self._encode_alone(shared, regions.image[part], mask[part]))
            pooled = pooled.index_copy(0, part, own_pooled)
            own_row = len(images) + torch.arange(len(part), device=images.device)
            region_row = region_row.index_copy(0, part, own_row)
            seen = replace(seen, patches=torch.cat([patches, own_patches]))
        return _followed_by(seen, pooled, region_row, mask)

    def with_regions(self, images: Concepts, regions: Regions) -> Concepts:
        """Encoded images with regions of them behind, pooled from their patches: no image is encoded again.

        Raises:
            ValueError: the model has ``local_layers``, whose regions are made from what enters these.
        """
        if self.config.local_layers:
            raise ValueError("vision.local_layers re-encode regions, so they cannot be pooled from encoded images")
        mask = self._patches_of(regions)
        inside = self._mean_in_box(images.patches, regions, mask)
        pooled = torch.where(regions.whole[:, None], images.pooled[regions.image], inside)
        return _followed_by(images, pooled, images.row[regions.image], mask)

    def _patches_of(self, regions: Regions) -> Bool[Tensor, "region patch"]:
        mask = boxes.patch_mask(regions.boxes_xywh, self.grid, self.config.image_size)
        return mask | regions.whole[:, None]

    def _tokens(self, features: Tensor) -> tuple[Float[Tensor, "row patch dim"], Float[Tensor, "row dim"]]:
        """What the trunk returns -> patch tokens in reading order, and the pooled token."""
        if features.ndim == 4:
            layout = "row dim y x" if self.channels_first else "row y x dim"
            features = rearrange(features, f"{layout} -> row (y x) dim")
        features = self._normed(features)
        patches = features[:, self.prefix :]
        if self.config.positions:
            patches = self.norm(patches) + self.positions
        return patches, (features[:, 0] if self.pools_class_token else patches.mean(1))

    def _normed(self, features: Tensor) -> Tensor:
        """Where a ViT leaves its last norm to be done on the mean, for its classifier, each token has it."""
        fc_norm, norm = getattr(self.trunk, "fc_norm", None), getattr(self.trunk, "norm", None)
        return fc_norm(features) if fc_norm is not None and isinstance(norm, nn.Identity) else features

    def _mean_in_box(
        self, patches: Float[Tensor, "image patch dim"], regions: Regions, mask: Bool[Tensor, "region patch"]
    ) -> Float[Tensor, "region dim"]:
        weight = mask.float()
        if self.config.pooling == "soft":
            cover = boxes.patch_cover(regions.boxes_xywh, self.grid, self.config.image_size)
            weight = torch.where(regions.whole[:, None], weight, cover)
        # The mean is taken in float32 whatever the patches' precision: small boxes average few, large ones many.
        weight = weight / weight.sum(1, keepdim=True)
        with torch.autocast(patches.device.type, enabled=False):
            return _pool(weight, patches.float(), regions.image).to(patches.dtype)

    def _features_and_shared(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> tuple[Float[Tensor, "image token dim"], Float[Tensor, "image token dim"]]:
        """What the trunk returns, and what enters its local layers: the same for an image and its regions."""
        before = len(self.trunk.blocks) - self.config.local_layers - 1
        features, [(patches, prefix)] = self.trunk.forward_intermediates(
            images, indices=[before], return_prefix_tokens=True, output_fmt="NLC"
        )
        return features, torch.cat([prefix, patches], 1)

    def _encode_alone(
        self, shared: Float[Tensor, "image token dim"], image: Int[Tensor, "region"], mask: Bool[Tensor, "region patch"]
    ) -> Float[Tensor, "region token dim"]:
        """Regions after the local layers, which see the class token and the patches in ``mask``.

        The reference runs every patch of the image for every region and lets them attend to those few; the others are
        never looked at again, so here they are not computed: they come back as zeros.
        """
        seen = F.pad(mask, (self.prefix, 0), value=True)
        page = Page.of(seen)
        region, slot = seen.nonzero().unbind(1)
        x = page.packing.pad(shared[image[region], slot])
        visible = rearrange(page.sees(page), "group slot other -> group 1 slot other")
        for block in self.trunk.blocks[-self.config.local_layers :]:
            if self.trunk.grad_checkpointing:
                x = checkpoint(block, x, attn_mask=visible, use_reentrant=False)
            else:
                x = block(x, attn_mask=visible)
        alone = page.packing.pack(self.trunk.norm(x))
        return alone.new_zeros(*seen.shape, alone.shape[-1]).index_put((region, slot), alone)


def _followed_by(seen: Concepts, pooled: Tensor, row: Tensor, mask: Tensor) -> Concepts:
    return replace(
        seen,
        pooled=torch.cat([seen.pooled, pooled]),
        row=torch.cat([seen.row, row]),
        mask=torch.cat([seen.mask, mask]),
    )


def _pool(
    weight: Float[Tensor, "region patch"], patches: Float[Tensor, "image patch dim"], image: Int[Tensor, "region"]
) -> Float[Tensor, "region dim"]:
    """Weighted sums of each region's patches, which are not copied for each of an image's thousands of regions."""
    by_image = Packing.by(image, len(patches))
    return by_image.pack(by_image.pad(weight) @ patches)


def regions_in_pixels(
    boxes_xyxy: Float[Tensor, "region 4"], image: Int[Tensor, "region"], size: tuple[int, int]
) -> Regions:
    """Boxes in pixels of images of ``size`` (height, width) as parts of these; ``image`` says of which each is one."""
    boxes_xyxy = boxes_xyxy.double()  # float32 would move an edge over the border of a patch
    scale = boxes_xyxy.new_tensor([size[1], size[0]] * 2)
    whole = torch.zeros(len(image), dtype=torch.bool, device=image.device)
    return Regions(image, boxes.xyxy_to_cxcywh(boxes_xyxy / scale), boxes.xyxy_to_xywh(boxes_xyxy), whole)


def _create_trunk(config: VisionConfig) -> nn.Module:
    if not timm.is_model(config.trunk):
        near = difflib.get_close_matches(config.trunk, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"vision.trunk {config.trunk!r} is not a timm model{hint}")
    # Transformers want their size at birth, convolutional trunks do not know the argument.
    try:
        return timm.create_model(config.trunk, num_classes=0, img_size=config.image_size, **config.options)
    except TypeError:
        pass
    except Exception as error:  # each family has its own way to say that a size or an option does not fit
        raise ValueError(_refusal(config, f"{type(error).__name__} {error}".strip())) from error
    try:
        return timm.create_model(config.trunk, num_classes=0, **config.options)
    except Exception as error:
        raise ValueError(f"vision.options {config.options} do not fit {config.trunk}: {error}") from error


def _refusal(config: VisionConfig, why: str) -> str:
    height, width = config.image_size
    with_options = f" with options {config.options}" if config.options else ""
    return f"vision.trunk {config.trunk}{with_options} does not take images of {height} x {width} pixels: {why}"


def _parameters_behind(output: Tensor) -> set[nn.Parameter]:
    """The parameters that a tensor was computed from."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if hasattr(step, "variable"):
            found.add(step.variable)
        waiting += [before for before, _ in step.next_functions]
    return found


def _sine_positions(rows: int, columns: int, dim: int) -> Float[Tensor, "patch dim"]:
    """Sines and cosines of row and column: a start from which neighbours already look alike.

    They sum to zero over the grid: the mean of all patches, which stands for the whole image, says nothing of place.
    """
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    frequency = torch.pi * 2 ** torch.linspace(-1, 4, dim // 4)
    angles = [axis.flatten()[:, None] * frequency for axis in (y, x)]
    waves = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    waves = waves - waves.mean(0)
    return nn.functional.pad(waves, (0, dim - waves.shape[1]))
