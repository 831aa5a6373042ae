"""The model gives the numbers of the public reference: arrays written by its own code, at tiny sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from xvlm import boxes, losses
from xvlm.models import convert
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig, load_strictly
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.types import Batch, Masked, Regions, Texts


class Golden:
    """One case folder: the model it holds, its inputs, its outputs."""

    def __init__(self, folder: Path):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.inputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}
        self.outputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "outputs.npz").items()}
        config, vision, text = (self.manifest[key] for key in ("config", "vision_config", "text_config"))
        self.fusion_layer = text["fusion_layer"]
        self.size = config["image_res"]
        swin = {key: vision[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
        self.model = XVLM(
            XVLMConfig(
                vision=VisionConfig(
                    trunk="swin_tiny_patch4_window7_224", image_size=(self.size, self.size), options=swin
                ),
                text=TextConfig(
                    vocab_size=text["vocab_size"],
                    dim=text["hidden_size"],
                    heads=text["num_attention_heads"],
                    feed_forward=text["intermediate_size"],
                    text_layers=self.fusion_layer,
                    cross_layers=text["num_hidden_layers"] - self.fusion_layer,
                    max_positions=text["max_position_embeddings"],
                ),
                embed_dim=config["embed_dim"],
            )
        ).eval()
        state = load_file(folder / "state.safetensors")
        load_strictly(self.model, convert.official(state, self.fusion_layer), folder)

    def batch(self, kind: str) -> Batch:
        given = {name.removeprefix(kind): array for name, array in self.inputs.items() if name.startswith(kind)}
        mask = given["text_atts"].bool()
        hidden = torch.zeros_like(mask)
        row, slot = (given["masked_ids"] != -100).nonzero().unbind(1)
        hidden[row, given["masked_pos"][row, slot]] = True
        count = len(mask)
        if kind == "img_":
            regions = Regions(
                torch.arange(count),
                torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1),
                torch.tensor([[0.0, 0.0, self.size, self.size]]).repeat(count, 1),
                torch.ones(count, dtype=torch.bool),
            )
        else:
            box = given["target_bbox"]
            regions = Regions(
                given["idx_to_group_img"],
                box,
                boxes.xyxy_to_xywh(boxes.cxcywh_to_xyxy(box)) * self.size,
                given["is_image"].bool(),
            )
        texts = Texts(given["text_ids"], mask)
        return Batch(given["image"], texts, regions, Masked(given["text_ids_masked"], hidden))


@pytest.fixture(scope="module")
def pretrain_swin(request) -> Golden:
    folder = Path(request.config.getoption("--goldens")) / "pretrain_swin"
    if not folder.is_dir():
        pytest.skip(f"no reference arrays in {folder}")
    return Golden(folder)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_parameter_count(pretrain_swin):
    assert sum(p.numel() for p in pretrain_swin.model.parameters()) == pretrain_swin.manifest["num_params"]


@pytest.mark.parametrize("kind", ["img_", "reg_"])
def test_encoders(pretrain_swin, kind):
    model, expected, batch = pretrain_swin.model, pretrain_swin.outputs, pretrain_swin.batch(kind)
    concepts = model.encode_image(batch.images, batch.regions)
    part = concepts.take(len(batch.images) + torch.arange(len(batch.texts.ids)))
    close(part.pooled, expected[f"{kind}image_embeds"][:, 0])
    close(part.patches[part.row], expected[f"{kind}image_embeds"][:, 1:])
    if kind == "reg_":
        assert torch.equal(part.mask, pretrain_swin.inputs["reg_image_atts"][:, 1:].bool())
    words = model.encode_text(batch.texts)
    mask = batch.texts.mask
    close(words.padded()[mask], expected[f"{kind}text_embeds"][mask])
    image, text = model.embed_image(part), model.embed_text(words)
    close(image, expected[f"{kind}image_feat"])
    close(text, expected[f"{kind}text_feat"])
    close(image @ text.T / model.temperature, expected[f"{kind}itc_logits"])
    own = torch.eye(len(image), dtype=torch.bool)
    wrong_image, wrong_text = losses.negative_weights(image, text, model.temperature, own)
    close(wrong_image, expected[f"{kind}neg_weights_t2i"])
    close(wrong_text, expected[f"{kind}neg_weights_i2t"])


@pytest.mark.parametrize("kind", ["img_", "reg_"])
def test_losses_and_gradients(pretrain_swin, kind, monkeypatch):
    model, batch = pretrain_swin.model, pretrain_swin.batch(kind)
    row = torch.arange(len(batch.texts.ids))
    negatives = (row, pretrain_swin.inputs[f"{kind}image_neg_idx"], row, pretrain_swin.inputs[f"{kind}text_neg_idx"])
    monkeypatch.setattr(losses, "hard_negatives", lambda *_: negatives)
    model.zero_grad()
    found = Task(PretrainingConfig(), model)({"caption" if kind == "img_" else "region": batch})
    named = {name.split("/")[1]: loss for name, loss in found.items()}
    theirs = {"itc": "itc", "itm": "itm", "mlm": "mlm", "box_l1": "bbox", "box_giou": "giou"}
    assert set(named) == set(theirs) - ({"box_l1", "box_giou"} if kind == "img_" else set())
    for name, loss in named.items():
        torch.testing.assert_close(
            loss.detach(), pretrain_swin.outputs[f"{kind}loss_{theirs[name]}"], atol=1e-5, rtol=1e-6
        )
    sum(named.values()).backward()
    norms = {name: torch.tensor(g["norm"]) for name, g in pretrain_swin.manifest[f"{kind}grads"].items()}
    expected = convert.official(norms, pretrain_swin.fusion_layer)
    own = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == expected.keys()
    for name, norm in expected.items():
        if norm > 1e-6:  # below, the true gradient is zero (biases of attention keys)
            torch.testing.assert_close(own[name], norm.float(), rtol=1e-3, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["reg_"])
def test_boxes(pretrain_swin, kind):
    model, batch = pretrain_swin.model, pretrain_swin.batch(kind)
    fused = model.fuse(model.encode_text(batch.texts), model.encode_image(batch.images), batch.regions.image)
    close(fused.first, pretrain_swin.outputs["reg_bbox_cls"])
    close(model.locate(fused), pretrain_swin.outputs["reg_output_coord"])


def test_region_masks(goldens):
    rows = json.loads((goldens / "functions/functions.json").read_text())["region_attention"]["rows"]
    assert rows
    for row in rows:
        n = row["image_res"] // row["patch_size"]
        size = (row["image_res"], row["image_res"])
        mask = boxes.patch_mask(torch.tensor([row["box"]], dtype=torch.float64), (n, n), size)[0]
        assert [0, *(mask.nonzero()[:, 0] + 1).tolist()] == row["ones"]


def test_learning_rates(goldens):
    from xvlm.optim import OptimConfig, lr_factor

    for row in json.loads((goldens / "functions/functions.json").read_text())["lr_schedule"]:
        steps = row["epochs"] * row["step_per_epoch"]
        config = OptimConfig(warmup=row["num_warmup_steps"])
        found = [lr_factor(step, steps, config) for step in range(len(row["factor"]))]
        np.testing.assert_allclose(found, row["factor"], atol=1e-12)
