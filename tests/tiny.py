"""A model small enough for tests, and batches made of noise."""

import torch

from xvlm.boxes import xyxy_to_cxcywh, xyxy_to_xywh
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig
from xvlm.types import Batch, Masked, Regions, Texts

TEXT = TextConfig(
    vocab_size=60, dim=16, heads=2, feed_forward=32, text_layers=2, cross_layers=2, max_positions=16, dropout=0.0
)
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VISION = VisionConfig(trunk="swin_tiny_patch4_window7_224", image_size=(32, 32), options=SWIN)
CONFIG = XVLMConfig(vision=VISION, text=TEXT, embed_dim=8)


def model(config: XVLMConfig = CONFIG) -> XVLM:
    """Built from seed 0, with the embeddings large enough for its outputs to differ visibly."""
    torch.manual_seed(0)
    made = XVLM(config).eval()
    torch.nn.init.normal_(made.text.words.weight)
    return made


def texts(count: int, generator: torch.Generator) -> Texts:
    lengths = torch.randint(3, 9, (count,), generator=generator)
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.randint(5, 60, (count, 9), generator=generator) * mask
    ids[:, 0] = 2
    return Texts(ids, mask)


def batch(images: int = 3, per_image: int = 3, seed: int = 0, *, whole: bool = False, size: int = 32) -> Batch:
    """Noise images with a caption each and regions, or (``whole``) captions only."""
    g = torch.Generator().manual_seed(seed)
    per_image = 1 if whole else per_image
    count = images * per_image
    image = torch.arange(images).repeat_interleave(per_image)
    is_whole = torch.arange(count) % per_image == 0
    corner = torch.rand(count, 2, generator=g) * 0.5
    xyxy = torch.cat([corner, corner + 0.2 + 0.3 * torch.rand(count, 2, generator=g)], 1)
    xyxy = torch.where(is_whole[:, None], torch.tensor([0.0, 0.0, 1.0, 1.0]), xyxy)
    said = texts(count, g)
    hidden = torch.zeros_like(said.mask)
    hidden[:, 1:3] = said.mask[:, 1:3]
    return Batch(
        torch.randn(images, 3, size, size, generator=g),
        said,
        Regions(image, xyxy_to_cxcywh(xyxy), xyxy_to_xywh(xyxy) * size, is_whole),
        Masked(torch.where(hidden, 4, said.ids), hidden),
        ids=tuple(f"r{i}" for i in range(images)),
    )
