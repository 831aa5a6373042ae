"""Write the small reference folders beside this file: `python tests/goldens/make.py [FOLDER]`.

Nothing here comes from xvlm. The encoders are Hugging Face's Swin, ViT and BERT layers in float64; what X-VLM adds to
them (regions, the passes, the losses) is written out as its paper and public code define it, in the plainest way.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, ViTConfig, ViTModel
from transformers.models.bert.modeling_bert import BertLayer, BertPredictionHeadTransform

SIDE, EMBED, SLOTS = 32, 8, 3  # pixels, width of the common space, most hidden words of a text
TEXT = {
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "fusion_layer": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
SWIN = {"window_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
VIT = {"embed_dim": 10, "depth": 3, "num_heads": 2, "local_attn_depth": 2}
PATCH = 8  # pixels of a patch of either tower's output
GRID = SIDE // PATCH


class Swin(nn.Module):
    """Patches after the last norm, behind them as pooled token their mean, or the mean of those in a region."""

    width = 2 * SWIN["embed_dim"]

    def __init__(self):
        super().__init__()
        options = {key: SWIN[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
        config = SwinConfig(image_size=SIDE, patch_size=4, attn_implementation="eager", **options)
        self.model = SwinModel(config, add_pooling_layer=False)

    def forward(self, images: Tensor, image_of: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.model(images).last_hidden_state
        everything = torch.cat([patches.mean(1, keepdim=True), patches], 1)
        inside = atts[:, 1:, None].double()
        mean = (patches[image_of] * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
        return torch.cat([mean, patches[image_of]], 1), everything

    def names(self) -> dict[str, list[str]]:
        tables = {"vision_encoder.norm": "model.layernorm", "vision_encoder.patch_embed.norm": "model.embeddings.norm"}
        tables["vision_encoder.patch_embed.proj"] = "model.embeddings.patch_embeddings.projection"
        found = _with_bias(tables)
        for stage, depth in enumerate(SWIN["depths"]):
            for number in range(depth):
                theirs, ours = (f"{p}layers.{stage}.blocks.{number}" for p in ("vision_encoder.", "model.encoder."))
                found |= _block(theirs, ours, ours)
                table = "relative_position_bias_table"
                found[f"{theirs}.attn.{table}"] = [f"{ours}.attention.relative_position_bias.{table}"]
            if stage + 1 < len(SWIN["depths"]):
                theirs, ours = (f"{p}layers.{stage}.downsample" for p in ("vision_encoder.", "model.encoder."))
                found |= _with_bias({f"{theirs}.norm": f"{ours}.norm"})
                found[f"{theirs}.reduction.weight"] = [f"{ours}.reduction.weight"]
        return found


class Vit(nn.Module):
    """Class token and patches; the last layers run once more for each region, where nothing looks outside of it."""

    width = VIT["embed_dim"]

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=VIT["embed_dim"],
            num_hidden_layers=VIT["depth"],
            num_attention_heads=VIT["num_heads"],
            intermediate_size=4 * VIT["embed_dim"],
            layer_norm_eps=1e-6,
            attn_implementation="eager",
        )
        self.model = ViTModel(config, add_pooling_layer=False)

    def forward(self, images: Tensor, image_of: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        shared = VIT["depth"] - VIT["local_attn_depth"]
        states = self.model.embeddings(images)
        for layer in self.model.layers[:shared]:
            states = layer(states, None)
        regions = states[image_of]
        for layer in self.model.layers[shared:]:
            states, regions = layer(states, None), layer(regions, _hide(atts))
        return self.model.layernorm(regions), self.model.layernorm(states)

    def names(self) -> dict[str, list[str]]:
        found = {"vision_encoder.cls_token": ["model.embeddings.cls_token"]}
        found["vision_encoder.pos_embed"] = ["model.embeddings.position_embeddings"]
        tables = {"vision_encoder.norm": "model.layernorm"}
        tables["vision_encoder.patch_embed.proj"] = "model.embeddings.patch_embeddings.projection"
        found |= _with_bias(tables)
        for number in range(VIT["depth"]):
            ours = f"model.layers.{number}"
            found |= _block(f"vision_encoder.blocks.{number}", ours, ours)
        return found


def _with_bias(tables: dict[str, str]) -> dict[str, list[str]]:
    return {f"{a}.{end}": [f"{b}.{end}"] for a, b in tables.items() for end in ("weight", "bias")}


def _block(theirs: str, ours: str, attention: str) -> dict[str, list[str]]:
    found = _with_bias(
        {
            f"{theirs}.norm1": f"{ours}.layernorm_before",
            f"{theirs}.norm2": f"{ours}.layernorm_after",
            f"{theirs}.attn.proj": f"{attention}.attention.o_proj",
            f"{theirs}.mlp.fc1": f"{ours}.mlp.fc1",
            f"{theirs}.mlp.fc2": f"{ours}.mlp.fc2",
        }
    )
    for end in ("weight", "bias"):  # one matrix for the three
        found[f"{theirs}.attn.qkv.{end}"] = [f"{attention}.attention.{part}_proj.{end}" for part in "qkv"]
    return found


def _hide(atts: Tensor) -> Tensor:
    """0 where a token may be looked at, far below everything where not."""
    return (1 - atts[:, None, None].double()) * -1e9


class Model(nn.Module):
    def __init__(self, vision: nn.Module):
        super().__init__()
        self.vision = vision
        dim, words = TEXT["hidden_size"], TEXT["vocab_size"]
        shape = {key: value for key, value in TEXT.items() if key not in ("fusion_layer", "num_hidden_layers")}
        self.layers = TEXT["fusion_layer"]
        config = BertConfig(num_hidden_layers=self.layers, attn_implementation="eager", **shape)
        self.text = BertModel(config, add_pooling_layer=False)
        looking = BertConfig(is_decoder=True, add_cross_attention=True, attn_implementation="eager", **shape)
        self.cross = nn.ModuleList(BertLayer(looking) for _ in range(TEXT["num_hidden_layers"] - self.layers))
        for layer in self.cross:  # images are as wide as their encoder makes them
            layer.crossattention.self.key = nn.Linear(vision.width, dim)
            layer.crossattention.self.value = nn.Linear(vision.width, dim)
        self.transform = BertPredictionHeadTransform(looking)
        self.word_bias = nn.Parameter(torch.zeros(words))
        self.image_projection, self.text_projection = nn.Linear(vision.width, EMBED), nn.Linear(dim, EMBED)
        self.temperature = nn.Parameter(torch.tensor(0.0))
        self.match, self.box = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, out))
            for out in (2, 4)
        )

    def read(self, ids: Tensor, atts: Tensor) -> Tensor:
        return self.text(ids, attention_mask=atts).last_hidden_state

    def fuse(self, words: Tensor, atts: Tensor, tokens: Tensor, token_atts: Tensor) -> Tensor:
        for layer in self.cross:
            words = layer(words, _hide(atts), tokens, _hide(token_atts))
        return words

    def words(self, states: Tensor) -> Tensor:
        return self.transform(states) @ self.text.embeddings.word_embeddings.weight.T + self.word_bias

    def names(self) -> dict[str, list[str]]:
        """Official names, each with the names here whose tensors, one after the other, it stands for."""
        found = {name: [f"vision.{part}" for part in parts] for name, parts in self.vision.names().items()}
        for name, _ in self.named_parameters():
            if name.startswith("text."):
                found[f"text_encoder.bert.{name.removeprefix('text.')}"] = [name]
            elif name.startswith("cross."):
                number, rest = name.removeprefix("cross.").split(".", 1)
                found[f"text_encoder.bert.encoder.layer.{int(number) + self.layers}.{rest}"] = [name]
            elif name.startswith("transform."):
                found[f"text_encoder.cls.predictions.{name}"] = [name]
        found |= {"temp": ["temperature"], "text_encoder.cls.predictions.bias": ["word_bias"]}
        for theirs, ours in (("vision_proj", "image_projection"), ("text_proj", "text_projection")):
            found |= _with_bias({theirs: ours})
        for theirs, ours in (("itm_head", "match"), ("bbox_head", "box")):
            found |= _with_bias({f"{theirs}.{i}": f"{ours}.{i}" for i in (0, 1, 3)})
        assert sorted(part for parts in found.values() for part in parts) == sorted(dict(self.named_parameters()))
        return found


TIED = [
    ["text_encoder.bert.embeddings.word_embeddings.weight", "text_encoder.cls.predictions.decoder.weight"],
    ["text_encoder.cls.predictions.bias", "text_encoder.cls.predictions.decoder.bias"],
]


def fill(model: nn.Module, rng: np.random.Generator) -> None:
    """Noise in every parameter: no term hides behind a zero or a one. Exact in float32."""
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(parameter.shape)
        if parameter.ndim > 1 and "table" not in name:
            noise /= math.sqrt(parameter[0].numel())
        elif "norm" in name.lower() and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.3 * noise
        parameter.data = torch.tensor(noise, dtype=torch.float32).double()
    model.temperature.data.fill_(0.25)


# Inputs.


def texts(lengths: list[int], rng: np.random.Generator) -> dict[str, Tensor]:
    """[CLS] (2) and words; of each text some words, two at least where there are as many, are hidden (4)."""
    longest = max(lengths) + 1  # one column of padding for all
    ids, atts = torch.zeros(len(lengths), longest).long(), torch.zeros(len(lengths), longest).long()
    slots, labels = torch.zeros(len(lengths), SLOTS).long(), torch.full((len(lengths), SLOTS), -100)
    masked = ids.clone()
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([2, *rng.integers(5, TEXT["vocab_size"], length - 1)])
        atts[row, :length] = 1
        chosen = torch.tensor(rng.permutation(np.arange(1, length))[: 1 + row % SLOTS])
        masked[row] = ids[row]
        slots[row, : len(chosen)], labels[row, : len(chosen)] = chosen, ids[row, chosen]
        masked[row, chosen] = 4
    named = {"text_ids": ids, "text_atts": atts, "text_ids_masked": masked, "masked_pos": slots, "masked_ids": labels}
    return named


def pixels(count: int, rng: np.random.Generator) -> Tensor:
    return torch.tensor(rng.integers(-4, 5, (count, 3, SIDE, SIDE)) / 2, dtype=torch.float32)


def negatives(count: int, rng: np.random.Generator) -> dict[str, Tensor]:
    other = (np.arange(count) + rng.integers(1, count, (2, count))) % count
    return {"image_neg_idx": torch.tensor(other[0]), "text_neg_idx": torch.tensor(other[1])}


def captions(rng: np.random.Generator) -> dict[str, Tensor]:
    return {"image": pixels(4, rng)} | texts([7, 3, 9, 5], rng) | negatives(4, rng)


def regions(rng: np.random.Generator) -> dict[str, Tensor]:
    """Boxes x, y, w, h in pixels: across patches, in one patch, on their borders, the whole image."""
    image_of = torch.tensor([0, 0, 1, 2, 2, 2])
    boxes = [[3, 5, 18.5, 9], [20, 17, 3, 4], [8, 0, 16, 24], [0, 0, SIDE, SIDE], [25.5, 1, 6.5, 30], [0, 16, 8, 8]]
    atts = torch.zeros(len(boxes), 1 + GRID * GRID).long()
    atts[:, 0] = 1
    for row, (x, y, w, h) in enumerate(boxes):
        for i in range(math.floor(y / PATCH), math.ceil((y + h) / PATCH)):
            for j in range(math.floor(x / PATCH), math.ceil((x + w) / PATCH)):
                atts[row, 1 + GRID * i + j] = 1
    x, y, w, h = torch.tensor(boxes).T / SIDE
    named = {"image": pixels(3, rng), "idx_to_group_img": image_of, "image_atts": atts}
    named |= {"target_bbox": torch.stack([x + w / 2, y + h / 2, w, h], 1)}
    named |= {"is_image": torch.tensor([int(box[2:] == [SIDE, SIDE]) for box in boxes])}
    return named | texts([4, 6, 3, 8, 5, 4], rng) | negatives(len(boxes), rng)


# Outputs.


def run(model: Model, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything X-VLM computes of a batch (its paper, section 3), a pass for each question."""
    rows = torch.arange(len(given["text_ids"]))
    image_of = given.get("idx_to_group_img", rows)
    token_atts = given.get("image_atts", torch.ones(len(rows), 1 + GRID * GRID).long())
    atts = given["text_atts"]
    tokens, everything = model.vision(given["image"].double(), image_of, token_atts)
    words = model.read(given["text_ids"], atts)
    image = F.normalize(model.image_projection(tokens[:, 0]), dim=1)
    text = F.normalize(model.text_projection(words[:, 0]), dim=1)
    logits = image @ text.T / model.temperature
    out = {"image_embeds": tokens, "text_embeds": words, "image_feat": image, "text_feat": text, "itc_logits": logits}
    out["loss_itc"] = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    off = 1 - torch.eye(len(rows))
    out |= {"neg_weights_t2i": (logits.T.softmax(1) + 1e-5) * off, "neg_weights_i2t": (logits.softmax(1) + 1e-5) * off}

    wrong_image, wrong_text = given["image_neg_idx"], given["text_neg_idx"]
    fused = [
        model.fuse(words[t], atts[t], tokens[i], token_atts[i])[:, 0]
        for t, i in ((rows, rows), (rows, wrong_image), (wrong_text, rows))
    ]
    out["itm_cls"] = torch.cat(fused)
    out["itm_logits"] = model.match(out["itm_cls"])
    right = (torch.arange(3 * len(rows)) < len(rows)).long()
    out["loss_itm"] = -out["itm_logits"].log_softmax(1).gather(1, right[:, None]).mean()

    masked = model.fuse(model.read(given["text_ids_masked"], atts), atts, tokens, token_atts)
    out["mlm_hidden"] = masked[rows[:, None], given["masked_pos"]]
    out["mlm_logits"] = model.words(out["mlm_hidden"])
    hidden = given["masked_ids"] != -100
    guessed = out["mlm_logits"].log_softmax(-1)[hidden].gather(1, given["masked_ids"][hidden][:, None])
    out["loss_mlm"] = -guessed.mean()
    out["loss"] = out["loss_itc"] + out["loss_itm"] + out["loss_mlm"]
    if "target_bbox" not in given:
        return out

    out["image_embeds_full"] = everything[image_of]
    out["bbox_cls"] = model.fuse(words, atts, everything[image_of], torch.ones_like(token_atts))[:, 0]
    out["output_coord"] = model.box(out["bbox_cls"]).sigmoid()
    target = given["target_bbox"].double()
    l1 = (out["output_coord"] - target).abs().sum(1)
    giou = torch.stack([generalised_iou(a, b) for a, b in zip(out["output_coord"], target, strict=True)])
    counted = given["is_image"] == 0
    out |= {"loss_bbox_all": l1.mean(), "loss_giou_all": (1 - giou).mean()}
    out |= {"loss_bbox": l1[counted].mean(), "loss_giou": (1 - giou)[counted].mean()}
    out["loss"] = out["loss"] + out["loss_bbox"] + out["loss_giou"]
    return out


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of two boxes cx, cy, w, h (Rezatofighi et al. 2019): IoU less the share of the hull that neither covers."""
    inner, hull = [], []
    for axis in (0, 1):
        lows = [box[axis] - box[axis + 2] / 2 for box in (a, b)]
        highs = [box[axis] + box[axis + 2] / 2 for box in (a, b)]
        inner.append((torch.minimum(*highs) - torch.maximum(*lows)).clamp(min=0))
        hull.append(torch.maximum(*highs) - torch.minimum(*lows))
    both, around = inner[0] * inner[1], hull[0] * hull[1]
    union = a[2] * a[3] + b[2] * b[3] - both
    return both / union - (around - union) / around


def case(name: str, vision: nn.Module, config: dict, vision_config: dict, seed: int, folder: Path) -> None:
    rng = np.random.default_rng(seed)
    model = Model(vision).double().eval()
    fill(model, rng)
    own, names = dict(model.named_parameters()), model.names()
    state = {
        theirs: torch.cat([own[part] for part in ours]) if len(ours) > 1 else own[ours[0]]
        for theirs, ours in names.items()
    }
    state |= {second: state[first] for first, second in TIED}
    state = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    inputs, outputs, manifest = {}, {}, {"case": name}
    for kind, given in (("img_", captions(rng)), ("reg_", regions(rng))):
        model.zero_grad()
        found = run(model, given)
        found["loss"].backward()
        inputs |= {kind + key: tensor for key, tensor in given.items()}
        outputs |= {kind + key: tensor.detach().float() for key, tensor in found.items()}
        manifest[f"{kind}grads"], manifest[f"{kind}grads_none"] = {}, []
        for theirs, ours in names.items():
            if own[ours[0]].grad is None:
                manifest[f"{kind}grads_none"].append(theirs)
                continue
            gradient = torch.cat([own[part].grad.flatten() for part in ours])
            probe = gradient @ torch.arange(len(gradient)).double().cos()
            norm = gradient.norm()
            manifest[f"{kind}grads"][theirs] = {"norm": float(f"{norm:.9g}"), "probe": float(f"{probe:.9g}")}
    manifest |= {
        "about": "one image batch (prefix img_) and one region batch (prefix reg_); see ../README.md",
        "config": {"image_res": SIDE, "patch_size": PATCH, "embed_dim": EMBED, "use_clip_vit": False} | config,
        "vision_config": vision_config,
        "text_config": TEXT,
        "tied_keys": TIED,
        "buffers": [],
        "num_params": sum(p.numel() for p in model.parameters()),
    }
    (folder / name).mkdir(parents=True, exist_ok=True)
    save_file(state, folder / name / "state.safetensors")
    for file, tensors in (("inputs", inputs), ("outputs", outputs)):
        np.savez_compressed(folder / name / f"{file}.npz", **{key: t.numpy() for key, t in tensors.items()})
    (folder / name / "manifest.json").write_text(json.dumps(manifest) + "\n")


def make(folder: Path) -> None:
    case("pretrain_swin", Swin(), {"use_swin": True}, SWIN, 1, folder)
    case("pretrain_vit", Vit(), {"use_swin": False, "vit_overrides": VIT}, {}, 2, folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
