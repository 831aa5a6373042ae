"""The patch encoder: any timm trunk sees an image once, and any box pools its patches into a concept."""

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from timm.models import VisionTransformer
from torch import Tensor, nn

from xvlm import boxes
from xvlm.config import Configured
from xvlm.models.packing import Page
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

    Swin and other trunks without a class token: the whole image's pooled token is the mean of its patches; a ViT's is
    its class token. A region's pooled token is the mean over the patches its box touches and it shares the image's
    patches, or with ``local_layers`` the last blocks run once more for it, on the class token and the patches its box
    touches alone, and it has a class token and a row of patches of its own (reference ``models/vit.py``).
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.trunk = _create_trunk(config)
        self.dim = self.trunk.num_features
        with torch.no_grad():
            was_training = self.trunk.training
            features = self.trunk.eval().forward_features(torch.zeros(1, 3, *config.image_size))
            self.trunk.train(was_training)
        self.prefix = self.trunk.num_prefix_tokens if features.ndim == 3 else 0
        self.channels_first = features.ndim == 4 and features.shape[1] == self.dim
        self.grid = self._grid(features)
        if config.local_layers:
            self._check_local_layers()
        if config.positions:
            self.norm = nn.LayerNorm(self.dim)
            self.positions = nn.Parameter(_sine_positions(*self.grid, self.dim))
        self.train()  # as modules begin, but with the statistics that stay as they are

    def _grid(self, features: Tensor) -> tuple[int, int]:
        if features.ndim == 4:
            rows, columns = features.shape[2:] if self.channels_first else features.shape[1:3]
            return int(rows), int(columns)
        rows, columns = self.trunk.patch_embed.grid_size
        if rows * columns != features.shape[1] - self.prefix:
            raise ValueError(
                f"{self.config.trunk}: {features.shape[1]} tokens are not {self.prefix} + {rows} x {columns} patches"
            )
        return rows, columns

    def train(self, mode: bool = True) -> "VisionEncoder":
        super().train(mode)
        if self.config.freeze_statistics:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _check_local_layers(self) -> None:
        local = self.config.local_layers
        if not isinstance(self.trunk, VisionTransformer) or not self.trunk.has_class_token:
            raise ValueError(f"vision.local_layers needs a ViT with a class token, {self.config.trunk} is none")
        if local >= len(self.trunk.blocks):
            raise ValueError(f"vision.local_layers is {local}, {self.config.trunk} has {len(self.trunk.blocks)} blocks")

    def forward(self, images: Float[Tensor, "image 3 height width"], regions: Regions | None = None) -> Concepts:
        """The images as concepts 0 … image-1; with ``regions``, theirs follow in order."""
        if images.shape[2:] != self.config.image_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.config.image_size}")
        local = self.config.local_layers
        features, shared = self._features_and_shared(images) if local else (self.trunk.forward_features(images), None)
        patches, whole = self._tokens(features)
        row = torch.arange(len(images), device=images.device)
        everything = torch.ones(patches.shape[:2], dtype=torch.bool, device=images.device)
        if regions is None:
            return Concepts(patches, whole, row, everything, self.grid)
        mask = boxes.patch_mask(regions.boxes_xywh, self.grid, self.config.image_size)
        mask = mask | regions.whole[:, None]
        pooled, region_row = whole[regions.image], regions.image
        if not local:
            pooled = torch.where(regions.whole[:, None], pooled, self._mean_in_box(patches, regions, mask))
        elif len(part := (~regions.whole).nonzero()[:, 0]):  # the others are the image, which has been encoded
            own_patches, own_pooled = self._tokens(self._encode_alone(shared, regions.image[part], mask[part]))
            pooled = pooled.index_copy(0, part, own_pooled)
            own_row = len(images) + torch.arange(len(part), device=images.device)
            region_row = region_row.index_copy(0, part, own_row)
            patches = torch.cat([patches, own_patches])
        return Concepts(
            patches, torch.cat([whole, pooled]), torch.cat([row, region_row]), torch.cat([everything, mask]), self.grid
        )

    def _tokens(self, features: Tensor) -> tuple[Float[Tensor, "row patch dim"], Float[Tensor, "row dim"]]:
        """What the trunk returns -> patch tokens in reading order, and the pooled token."""
        if features.ndim == 4:
            layout = "row dim y x" if self.channels_first else "row y x dim"
            features = rearrange(features, f"{layout} -> row (y x) dim")
        patches = features[:, self.prefix :]
        if self.config.positions:
            patches = self.norm(patches) + self.positions
        return patches, (features[:, 0] if self.prefix else patches.mean(1))

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
            x = block(x, attn_mask=visible)
        alone = page.packing.pack(self.trunk.norm(x))
        return alone.new_zeros(*seen.shape, alone.shape[-1]).index_put((region, slot), alone)


def _pool(
    weight: Float[Tensor, "region patch"], patches: Float[Tensor, "image patch dim"], image: Int[Tensor, "region"]
) -> Float[Tensor, "region dim"]:
    if len(patches) == 1:  # thousands of boxes of one image: its patches are not copied for each of them
        return weight @ patches[0]
    return torch.einsum("rp,rpd->rd", weight, patches[image])


def _create_trunk(config: VisionConfig) -> nn.Module:
    # Transformers want their size at birth, convolutional trunks do not know the argument.
    try:
        return timm.create_model(config.trunk, num_classes=0, img_size=config.image_size, **config.options)
    except TypeError:
        pass
    except RuntimeError as error:
        raise ValueError(f"vision.trunk {config.trunk!r} is not a timm model: {error}") from None
    try:
        return timm.create_model(config.trunk, num_classes=0, **config.options)
    except TypeError as error:
        raise ValueError(f"vision.options {config.options} do not fit {config.trunk}: {error}") from None


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
