"""Trunks of every kind that timm has: grids, the order of patches, pooled tokens and gradients, from random weights."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import tiny
import torch

from xvlm.models.vision import VisionConfig, VisionEncoder
from xvlm.tasks.pretraining import PretrainingConfig, Task


class Family(NamedTuple):
    trunk: str
    options: dict = {}
    patch: int = 32  # side in pixels
    frozen: tuple[str, ...] = ()  # parameters of the trunk's own head, on which its patches do not depend
    grid: tuple[int, int] = (2, 3)


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = tiny.SWIN | {"window_size": 2}
CONVNEXT = {"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1)}
SAM = VIT | {"window_size": 2, "global_attn_indexes": (1,)}
SEQUENCER = {"layers": (1,) * 4, "embed_dims": (8,) * 4, "hidden_sizes": (4,) * 4}
POOL, NORM = ("attn_pool.",), ("head.norm.",)

# Shrunk by options, to be quick.
SMALL = {
    "Swin": Family("swin_tiny_patch4_window7_224", SWIN, 8),
    "Swin V2": Family("swinv2_tiny_window8_256", SWIN, 8),
    "ViT": Family("vit_tiny_patch16_224", VIT, 16),
    "ViT without class token": Family("vit_base_patch16_gap_224", VIT, 16),
    "ViT with registers alone": Family("vit_medium_patch16_reg4_gap_256", VIT, 16),
    "ViT with relative positions": Family("vit_relpos_small_patch16_224", VIT, 16),
    "DeiT": Family("deit_tiny_patch16_224", VIT, 16),
    "DeiT distilled": Family("deit_tiny_distilled_patch16_224", VIT, 16),
    "DeiT III": Family("deit3_small_patch16_224", VIT, 16),
    "BEiT": Family("beit_base_patch16_224", VIT, 16),
    "BEiT v2": Family("beitv2_base_patch16_224", VIT, 16),
    "CLIP": Family("vit_base_patch32_clip_224", VIT, 32),
    "SigLIP": Family("vit_base_patch16_siglip_224", VIT, 16, POOL),
    "SigLIP 2": Family("vit_base_patch32_siglip_256", VIT, 32, POOL),
    "NaFlex": Family("naflexvit_base_patch16_gap", VIT, 16),
    "DINOv2": Family("vit_small_patch14_dinov2", VIT, 14),
    "DINOv2 with registers": Family("vit_small_patch14_reg4_dinov2", VIT, 14),
    "DINOv3": Family("vit_small_patch16_dinov3", VIT, 16),
    "EVA": Family("eva_large_patch14_196", VIT, 14),
    "EVA-02": Family("eva02_tiny_patch14_224", VIT, 14),
    "Perception Encoder": Family("vit_pe_core_tiny_patch16_384", VIT, 16, POOL),
    "SAM": Family("samvit_base_patch16", SAM, 16, (), (4, 6)),  # ends in a convolution
    "ConvNeXt": Family("convnext_atto", CONVNEXT, 32, NORM),
    "ConvNeXt V2": Family("convnextv2_atto", CONVNEXT, 32, NORM),
    "Hiera": Family("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": (1,) * 4}, 32, NORM),
    "ResNet": Family("resnet10t", {"channels": (8, 8, 8, 8)}, 32),
    "EfficientNet": Family("test_efficientnet"),
    "NFNet": Family("test_nfnet"),
    "MambaOut": Family("test_mambaout", {}, 32, ("head.",)),
    "BYOB": Family("test_byobnet"),
    "PVT v2": Family("pvt_v2_b0", {"embed_dims": (8, 8, 8, 16), "num_heads": (1, 1, 1, 2)}),
    "XCiT": Family("xcit_nano_12_p16_224", VIT | {"depth": 1, "cls_attn_layers": 1}, 16),
    "CaiT": Family("cait_xxs24_224", VIT, 16),
    "Sequencer": Family("sequencer2d_s", SEQUENCER, 14),
}

# The smallest that timm has of each.
WHOLE = {
    family: Family(trunk, {}, patch, frozen, (6, 6))  # a multiple of three, for the cells, and square, for a few
    for family, (trunk, patch, frozen) in {
        "Swin": ("swin_tiny_patch4_window7_224", 32, ()),
        "Swin V2": ("swinv2_tiny_window8_256", 32, ()),
        "ViT": ("vit_tiny_patch16_224", 16, ()),
        "ViT without class token": ("vit_base_patch16_gap_224", 16, ()),
        "ViT with registers": ("vit_medium_patch16_reg4_gap_256", 16, ()),
        "ViT behind a ResNet": ("vit_tiny_r_s16_p8_224", 32, ()),
        "DeiT": ("deit_tiny_patch16_224", 16, ()),
        "DeiT distilled": ("deit_tiny_distilled_patch16_224", 16, ()),
        "DeiT III": ("deit3_small_patch16_224", 16, ()),
        "BEiT": ("beit_base_patch16_224", 16, ()),
        "BEiT v2": ("beitv2_base_patch16_224", 16, ()),
        "CLIP": ("vit_base_patch32_clip_224", 32, ()),
        "SigLIP": ("vit_base_patch16_siglip_224", 16, POOL),
        "SigLIP 2": ("vit_base_patch32_siglip_256", 32, POOL),
        "DINOv2": ("vit_small_patch14_dinov2", 14, ()),
        "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", 14, ()),
        "DINOv3": ("vit_small_patch16_dinov3", 16, ()),
        "EVA-02": ("eva02_tiny_patch14_224", 14, ()),
        "Perception Encoder": ("vit_pe_core_tiny_patch16_384", 16, POOL),
        "ConvNeXt": ("convnext_atto", 32, NORM),
        "ConvNeXt V2": ("convnextv2_atto", 32, NORM),
        "FocalNet": ("focalnet_tiny_srf", 32, ()),
        "Hiera": ("hiera_tiny_224", 32, NORM),
        "Hiera of SAM 2": ("hieradet_small", 32, ("head.",)),
        "MaxViT": ("maxvit_pico_rw_256", 32, ()),
        "CoAtNet": ("coatnet_pico_rw_224", 32, ()),
        "MViT v2": ("mvitv2_tiny", 32, ()),
        "ResNet": ("resnet10t", 32, ()),
        "RegNet": ("regnetx_002", 32, ()),
        "EfficientNet": ("efficientnet_lite0", 32, ()),
        "MobileNetV4": ("mobilenetv4_conv_small", 32, ("conv_head.", "norm_head.")),
        "PVT v2": ("pvt_v2_b0", 32, ()),
        "Twins": ("twins_pcpvt_small", 32, ()),
        "DaViT": ("davit_tiny", 32, ("head.",)),
        "TinyViT": ("tiny_vit_5m_224", 32, ("head.",)),
        "XCiT": ("xcit_nano_12_p16_224", 16, ()),
        "CaiT": ("cait_xxs24_224", 16, ()),
        "TNT": ("tnt_s_patch16_224", 16, ()),
        "VOLO": ("volo_d1_224", 16, ()),
        "MLP-Mixer": ("mixer_s32_224", 32, ()),
        "PoolFormer": ("poolformer_s12", 32, ("head.",)),
        "EfficientViT": ("efficientvit_b0", 32, ("head.",)),
        "FastViT": ("fastvit_t8", 32, ()),
        "RepViT": ("repvit_m0_9", 32, ()),
        "EdgeNeXt": ("edgenext_xx_small", 32, ("head.",)),
        "InceptionNeXt": ("inception_next_atto", 32, ("head.",)),
        "HGNet V2": ("hgnetv2_b0", 32, ("head.",)),
        "StarNet": ("starnet_s1", 32, ()),
        "DenseNet": ("densenet121", 32, ()),
    }.items()
}
# Its windows are 7 and 14 patches wide: untrained, it spreads what it sees over fewer than that.
WHOLE["TinyViT"] = WHOLE["TinyViT"]._replace(grid=(24, 24))


def check(family: Family) -> None:
    grid, size = family.grid, (family.grid[0] * family.patch, family.grid[1] * family.patch)
    vision = VisionConfig(trunk=family.trunk, options=family.options, image_size=size)
    model = tiny.model(tiny.CONFIG.model_copy(update={"vision": vision}))
    encoder, batch = model.vision, batch_of(size)
    concepts = encoder(batch.images, batch.regions)
    assert encoder.grid == concepts.grid == grid
    assert concepts.patches.shape == (3, grid[0] * grid[1], encoder.dim)
    check_pooled_tokens(encoder, concepts, batch)
    check_reading_order(encoder)
    check_gradients(model, batch, family.frozen)


def batch_of(size: tuple[int, int]):
    """As tiny.batch, with images of any height and width."""
    batch = tiny.batch()
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([size[1], size[0], size[1], size[0]]) / 32
    return replace(batch, images=images, regions=replace(batch.regions, boxes_xywh=batch.regions.boxes_xywh * scale))


def check_pooled_tokens(encoder, concepts, batch) -> None:
    (rows, columns), (height, width) = concepts.grid, encoder.config.image_size
    for r, image in enumerate(batch.regions.image.tolist()):
        x, y, w, h = batch.regions.boxes_xywh[r].tolist()
        inside = [
            concepts.patches[image, row * columns + column]
            for row, column in itertools.product(range(rows), range(columns))
            if column * width / columns < x + w and (column + 1) * width / columns > x
            if row * height / rows < y + h and (row + 1) * height / rows > y
        ]
        expected = concepts.pooled[image] if batch.regions.whole[r] else torch.stack(inside).mean(0)
        torch.testing.assert_close(concepts.pooled[3 + r], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def check_reading_order(encoder) -> None:
    """Make one patch of an image brighter after the other: of all orders, reading order explains best what changes.

    What changes everywhere alike is left out, and products are compared, so that it counts neither that a patch shows
    at all its neighbours nor that one reacts more than another.
    """
    rows, columns = 2, 3  # as many cells as there can be, to try all their orders
    height, width = encoder.config.image_size
    noise = torch.randn(4, 1, 3, height, width, generator=torch.Generator().manual_seed(2))
    lit = torch.zeros(rows * columns + 1, 1, height, width)  # the last one stays as it is
    for cell, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
        h, w = height // rows, width // columns
        lit[cell, :, row * h : (row + 1) * h, column * w : (column + 1) * w] = 1
    patches = encoder((noise + lit).flatten(0, 1)).patches.unflatten(0, (4, -1))
    change = patches[:, :-1] - patches[:, -1:]
    change = (change - change.mean(2, keepdim=True)).norm(dim=-1).mean(0).unflatten(1, encoder.grid)
    of_cell = change.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean((2, 4)).flatten(1).log()
    orders = list(itertools.permutations(range(rows * columns)))
    fits = of_cell[torch.arange(rows * columns), torch.tensor(orders)].sum(1)
    assert orders[fits.argmax()] == tuple(range(rows * columns))


def check_gradients(model, batch, frozen: tuple[str, ...]) -> None:
    sum(Task(PretrainingConfig(), model)({"region": batch}).values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    learn = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not set(without) & set(learn)
    heads = tuple(f"vision.trunk.{name}" for name in frozen)
    assert not [name for name in without if not name.startswith(heads or " ")]
    assert all(any(name.startswith(head) for name in without) for head in heads)


@pytest.mark.parametrize("name", SMALL)
def test_family(name):
    check(SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_family(name):
    check(WHOLE[name])


@pytest.mark.parametrize(
    ("trunk", "options", "size", "why"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, (28, 32), "4 x 4 patches of 8 x 8 pixels do not cover them"),
        ("maxvit_pico_rw_256", {}, (80, 96), "does not take images of 80 x 96 pixels: AssertionError"),
        ("vit_tiny_patch16_224", VIT, (40, 48), "does not take images of 40 x 48 pixels"),
        ("resnet10t", {}, (80, 96), "3 x 3 patches of 32 x 32 pixels do not cover them"),
        ("efficientformer_l1", {}, (192, 192), "does not take images of 192 x 192 pixels: RuntimeError"),
        ("pit_ti_224", {}, (224, 224), "1 tokens are no map of 7 x 7 patches"),
        ("coat_tiny", {}, (224, 224), "gives no map of patches"),
    ],
)
def test_sizes_and_trunks_that_do_not_fit_are_refused(trunk, options, size, why):
    with pytest.raises(ValueError, match=why):
        VisionEncoder(VisionConfig(trunk=trunk, options=options, image_size=size))


def test_an_odd_grid_and_windows_that_do_not_fit_it_work():
    encoder = VisionEncoder(
        VisionConfig(trunk="swin_tiny_patch4_window7_224", options=tiny.SWIN, image_size=(40, 56))
    ).eval()
    assert encoder.grid == (5, 7)
    lit = torch.zeros(2, 3, 40, 56)
    lit[1, :, 16:24, 24:32] = 3.0
    patches = encoder(lit).patches
    assert (patches[1] - patches[0]).norm(dim=1).argmax() == 2 * 7 + 3


def test_a_mistyped_trunk_gets_a_hint():
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_24' is not a timm model; did you mean vit_tiny_patch16_2"):
        VisionEncoder(VisionConfig(trunk="vit_tiny_patch16_24"))
