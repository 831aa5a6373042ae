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
from xvlm.models.xvlm import PRETRAINING_HEADS, XVLM, XVLMConfig, load_strictly
from xvlm.optim import OptimConfig, lr_factor, parameter_groups
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.types import Batch, Concepts, Masked, Regions, Texts

CASES = ("pretrain_swin", "pretrain_vit", "pretrain_clipvit", "pretrain_swin_roberta")


def vision_config(config: dict, vision: dict) -> VisionConfig:
    """Ours for the reference's: ``config`` names the tower, ``vision`` or ``vit_overrides`` shape it."""
    size = (config["image_res"], config["image_res"])
    if config["use_swin"]:
        options = {key: vision[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
        return VisionConfig(trunk="swin_base_patch4_window7_224", image_size=size, options=options)
    if config["use_clip_vit"]:
        width = vision["vision_width"]
        options = {
            "patch_size": vision["patch_size"],
            "embed_dim": width,
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_ratio": (vision["intermediate_size"] + 0.5) / width,  # timm rounds the product down
            "act_layer": vision["hidden_act"],
        }
        local = vision["local_attn_depth"]
        return VisionConfig(trunk="vit_base_patch16_clip_224", image_size=size, options=options, local_layers=local)
    options = {"patch_size": config["patch_size"], "local_attn_depth": 4} | config.get("vit_overrides", {})
    local = options.pop("local_attn_depth")
    return VisionConfig(trunk="vit_base_patch16_224", image_size=size, options=options, local_layers=local)


def text_config(text: dict) -> TextConfig:
    return TextConfig(
        vocab_size=text["vocab_size"],
        dim=text["hidden_size"],
        heads=text["num_attention_heads"],
        feed_forward=text["intermediate_size"],
        text_layers=text["fusion_layer"],
        cross_layers=text["num_hidden_layers"] - text["fusion_layer"],
        max_positions=text["max_position_embeddings"],
        position_offset=text["pad_token_id"] + 1 if text["model_type"] == "roberta" else 0,
        token_types=text["type_vocab_size"],
        norm_eps=text["layer_norm_eps"],
    )


class Golden:
    """One case folder: the model it holds, its inputs, its outputs."""

    def __init__(self, folder: Path, *, heads: tuple[str, ...] = PRETRAINING_HEADS, looks: int = 1):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.inputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}
        self.outputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "outputs.npz").items()}
        config = self.manifest["config"]
        self.size = config["image_res"]
        self.text = text_config(self.manifest["text_config"]).model_copy(update={"looks": looks})
        vision = vision_config(config, self.manifest["vision_config"])
        shape = XVLMConfig(vision=vision, text=self.text, embed_dim=config["embed_dim"], heads=heads)
        self.model = XVLM(shape).eval()
        self.state = load_file(folder / "state.safetensors")
        load_strictly(self.model, self.converted(self.state), folder)

    def converted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert.official(state, self.text.text_layers, self.text.looks)

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

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by the reference's names, flat: parts of our tensors, where we keep several of theirs in one."""
        names = list(self.state)
        numbered = {name: torch.full_like(self.state[name], i, dtype=torch.float64) for i, name in enumerate(names)}
        origin = self.converted(numbered)
        with_gradient = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        return {
            names[int(i)]: p.grad[origin[name] == i]
            for name, p in with_gradient
            for i in origin[name].unique().tolist()
        }


@pytest.fixture(scope="module", params=CASES)
def golden(request) -> Golden:
    folder = Path(request.config.getoption("--goldens")) / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference arrays in {folder}")
    return Golden(folder)


def read(path: Path) -> dict:
    if not path.is_file():
        pytest.skip(f"no reference values in {path}")
    return json.loads(path.read_text())


def close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def same_gradients(found: dict[str, torch.Tensor], expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        norm = expected[name]["norm"]
        if norm > 1e-6:  # below, the true gradient is zero (biases of attention keys)
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
            # A norm says nothing of direction or order: the reference also stores a fixed weighted sum.
            probe = gradient.double() @ torch.arange(len(gradient), dtype=torch.float64).cos()
            assert probe.item() == pytest.approx(expected[name]["probe"], abs=1e-3 * norm), name


def test_parameter_count(golden):
    assert sum(p.numel() for p in golden.model.parameters()) == golden.manifest["num_params"]


@pytest.mark.parametrize("kind", ["img_", "reg_"])
def test_outputs(golden, kind):
    """Every array except the losses, by the reference's names."""
    model, batch = golden.model, golden.batch(kind)
    given = {name.removeprefix(kind): array for name, array in golden.inputs.items() if name.startswith(kind)}
    expected = {name.removeprefix(kind): array for name, array in golden.outputs.items() if name.startswith(kind)}
    expected = {name: array for name, array in expected.items() if not name.startswith("loss")}
    pair = torch.arange(len(batch.texts.ids))
    part = len(batch.images) + pair

    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    pairs = concepts.take(part)
    found = {"image_embeds": tokens(pairs), "text_embeds": words.padded()}
    # What no one may look at is not computed: padding, and patches outside the box where regions are encoded anew.
    seen = torch.cat([torch.ones(len(pair), 1, dtype=torch.bool), pairs.mask], 1)
    for name, mask in {"image_embeds": seen, "text_embeds": batch.texts.mask}.items():
        found[name], expected[name] = found[name][mask], expected[name][mask]
    image, text = model.embed_image(pairs), model.embed_text(words)
    found |= {"image_feat": image, "text_feat": text, "itc_logits": image @ text.T / model.temperature}
    weights = losses.negative_weights(image, text, model.temperature, torch.eye(len(pair), dtype=torch.bool))
    found |= dict(zip(("neg_weights_t2i", "neg_weights_i2t"), weights, strict=True))

    about = torch.cat([part, part[given["image_neg_idx"]], part])
    fused = model.fuse(words, concepts, about, torch.cat([pair, pair, given["text_neg_idx"]]))
    found |= {"itm_cls": fused.first, "itm_logits": model.match(fused)}
    masked = model.encode_text(Texts(batch.masked.ids, batch.texts.mask))
    states = model.fuse(masked, concepts, part).padded()[pair[:, None], given["masked_pos"]]
    logits = model.guess_words(states.flatten(0, 1)).unflatten(0, states.shape[:2])
    found |= {"mlm_hidden": states, "mlm_logits": logits}
    if kind == "reg_":
        assert torch.equal(pairs.mask, given["image_atts"][:, 1:].bool())
        found["image_embeds_full"] = tokens(concepts.take(batch.regions.image))
        fused = model.fuse(words, concepts, batch.regions.image)
        found |= {"bbox_cls": fused.first, "output_coord": model.locate(fused)}
        of_all = losses.box_l1_giou(found["output_coord"], given["target_bbox"])
        for name, loss in zip(("bbox", "giou"), of_all, strict=True):
            same_loss(loss, golden.outputs[f"reg_loss_{name}_all"])
    assert found.keys() == expected.keys()
    for name, array in found.items():
        close(array, expected[name], name)


def tokens(concepts: Concepts) -> torch.Tensor:
    """The reference's layout: the pooled token, then all patches, for each concept."""
    return torch.cat([concepts.pooled[:, None], concepts.patches[concepts.row]], 1)


def same_loss(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["img_", "reg_"])
def test_losses_and_gradients(golden, kind, monkeypatch):
    model, batch = golden.model, golden.batch(kind)
    row = torch.arange(len(batch.texts.ids))
    negatives = (row, golden.inputs[f"{kind}image_neg_idx"], row, golden.inputs[f"{kind}text_neg_idx"])
    monkeypatch.setattr(losses, "hard_negatives", lambda *_: negatives)
    model.zero_grad()
    found = Task(PretrainingConfig(), model)({"caption" if kind == "img_" else "region": batch})
    named = {name.split("/")[1]: loss for name, loss in found.items()}
    theirs = {"itc": "itc", "itm": "itm", "mlm": "mlm", "box_l1": "bbox", "box_giou": "giou"}
    assert set(named) == set(theirs) - ({"box_l1", "box_giou"} if kind == "img_" else set())
    for name, loss in named.items():
        same_loss(loss, golden.outputs[f"{kind}loss_{theirs[name]}"])
    total = sum(named.values())
    same_loss(total, golden.outputs[f"{kind}loss"])
    total.backward()
    same_gradients(golden.gradients(), golden.manifest[f"{kind}grads"])


REAL = {
    "pretrain_swin224": XVLMConfig(),
    "pretrain_vit224": XVLMConfig(vision=VisionConfig(trunk="vit_base_patch16_224", local_layers=4)),
    "pretrain_clipvit224": XVLMConfig(vision=VisionConfig(trunk="vit_base_patch16_clip_quickgelu_224", local_layers=4)),
    "pretrain_swin224_roberta": XVLMConfig(
        text=TextConfig(vocab_size=50265, max_positions=514, position_offset=2, token_types=1, norm_eps=1e-5)
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_at_full_size(goldens, name):
    real = read(goldens / "statedict_real.json")["models"][name]
    with torch.device("meta"):  # shapes without memory
        model = XVLM(REAL[name])
        state = {key: torch.empty(about["shape"]) for key, about in real["keys"].items()}
    load_strictly(model, convert.official(state, REAL[name].text.text_layers), name)
    assert sum(p.numel() for p in model.parameters()) == real["num_params"]


GROUPS = [(True, 1.0), (False, 1.0), (True, 2.0), (False, 2.0)]  # of the reference: whether they decay, and their rate


@pytest.mark.parametrize("name", REAL)
def test_optimizer_groups_at_full_size(goldens, name):
    real = read(goldens / "statedict_real.json")["models"][name]
    theirs = list(real["keys"])
    numbered = {key: torch.tensor([i]) for i, key in enumerate(theirs)}  # renaming looks at names alone
    converted = convert.official(numbered, REAL[name].text.text_layers)
    known_as = {ours: [theirs[i] for i in numbers.flatten().tolist()] for ours, numbers in converted.items()}
    with torch.device("meta"):
        model = XVLM(REAL[name])
    fresh = [ours for ours, _ in model.named_parameters() if set(known_as[ours]) <= set(real["init_params"])]

    def differing(rule: str) -> dict[str, tuple[bool, float]]:
        groups = parameter_groups(model, OptimConfig(decay=rule), fresh)
        found = {ours: (group["weight_decay"] > 0, group["lr_scale"]) for group in groups for ours in group["names"]}
        assert found.keys() == {ours for ours, _ in model.named_parameters()}
        expected = {ours: {GROUPS[real["keys"][key]["optim_group"]] for key in known_as[ours]} for ours in found}
        return {ours: group for ours, group in found.items() if expected[ours] != {group}}

    assert differing("names") == {}
    assert differing("kind") == dict.fromkeys(["temperature", "itm_head.1.weight", "box_head.1.weight"], (False, 2.0))


def test_region_masks(goldens):
    rows = read(goldens / "functions/functions.json")["region_attention"]["rows"]
    assert rows
    for row in rows:
        n = row["image_res"] // row["patch_size"]
        size = (row["image_res"], row["image_res"])
        mask = boxes.patch_mask(torch.tensor([row["box"]], dtype=torch.float64), (n, n), size)[0]
        assert [0, *(mask.nonzero()[:, 0] + 1).tolist()] == row["ones"]


def test_learning_rates(goldens):
    for row in read(goldens / "functions/functions.json")["lr_schedule"]:
        steps = row["epochs"] * row["step_per_epoch"]
        config = OptimConfig(warmup=row["num_warmup_steps"])
        found = [lr_factor(step, steps, config) for step in range(len(row["factor"]))]
        np.testing.assert_allclose(found, row["factor"], atol=1e-12)
