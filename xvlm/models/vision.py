"""The patch encoder: any timm trunk sees an image once, and any box pools its patches into a concept."""

from typing import Any, Literal

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from xvlm import boxes
from xvlm.config import Configured
from xvlm.types import Concepts, Regions


class VisionConfig(Configured):
    """Which timm model, at which size, and how boxes pool. The default is X-VLM's Swin-B."""

    trunk: str = "swin_base_patch4_window7_224"
    options: dict[str, Any] = {}  # further arguments of timm.create_model, e.g. output_stride: 16
    image_size: tuple[int, int] = (224, 224)  # height, width
    pooling: Literal["hard", "soft"] = "hard"  # soft weighs a patch by the share of it that the box covers
    positions: bool = False  # normalise patches and add 2-D positions: for trunks that carry none, not X-VLM's
    freeze_statistics: bool = False  # keep BatchNorm's running statistics, as one does with pre-trained trunks


class VisionEncoder(nn.Module):
    """A timm trunk and the adapter around it.

    Swin and other trunks without a class token: the whole image's pooled token is the mean of its patches; a ViT's is
    its class token. A region's pooled token is the mean over the patches its box touches (X-VLM section 3.1).
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

    def patches(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> tuple[Float[Tensor, "image patch dim"], Float[Tensor, "image dim"]]:
        """Patch tokens and the whole image's pooled token."""
        if images.shape[2:] != self.config.image_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.config.image_size}")
        features = self.trunk.forward_features(images)
        if features.ndim == 4:
            layout = "image dim row column" if self.channels_first else "image row column dim"
            features = rearrange(features, f"{layout} -> image (row column) dim")
        patches = features[:, self.prefix :]
        if self.config.positions:
            patches = self.norm(patches) + self.positions
        return patches, (features[:, 0] if self.prefix else patches.mean(1))

    def forward(self, images: Float[Tensor, "image 3 height width"], regions: Regions | None = None) -> Concepts:
        """The images as concepts 0 … image-1; with ``regions``, theirs follow in order."""
        patches, whole = self.patches(images)
        row = torch.arange(len(images), device=images.device)
        everything = torch.ones(patches.shape[:2], dtype=torch.bool, device=images.device)
        if regions is None:
            return Concepts(patches, whole, row, everything, self.grid)
        mask = boxes.patch_mask(regions.boxes_xywh, self.grid, self.config.image_size)
        mask = mask | regions.whole[:, None]
        weight = mask.float()
        if self.config.pooling == "soft":
            cover = boxes.patch_cover(regions.boxes_xywh, self.grid, self.config.image_size)
            weight = torch.where(regions.whole[:, None], weight, cover)
        # The mean is taken in float32 whatever the patches' precision: small boxes average few, large ones many.
        weight = weight / weight.sum(1, keepdim=True)
        with torch.autocast(images.device.type, enabled=False):
            pooled = torch.einsum("rp,rpd->rd", weight, patches.float()[regions.image]).to(patches.dtype)
        pooled = torch.where(regions.whole[:, None], whole[regions.image], pooled)
        return Concepts(
            patches,
            torch.cat([whole, pooled]),
            torch.cat([row, regions.image]),
            torch.cat([everything, mask]),
            self.grid,
        )


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
