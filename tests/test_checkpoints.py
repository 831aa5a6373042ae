"""Official checkpoint files become ours whole or not at all."""

import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from reference import read, text_config, vision_config
from safetensors.torch import load_file

from xvlm.models import checkpoints, convert, golden, kinds, resize
from xvlm.models.card import text
from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.xvlm import PRETRAINING_HEADS, XVLM
from xvlm.types import Texts

TABLE = "vision.trunk.layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.fixture
def state() -> official.State:
    return official.checkpoint()


def test_every_tensor_is_renamed_or_dropped_for_a_reason(state):
    converted = checkpoints.official(state)
    assert converted.renamed.keys() | converted.dropped.keys() == state.keys()
    assert not converted.renamed.keys() & converted.dropped.keys()
    assert len(set(converted.renamed.values())) == len(converted.renamed) == len(converted.state)
    for name, new in converted.renamed.items():
        assert converted.state[new[0]] is state[name]
    assert len(converted.dropped) == 3 + 1 + 1 + 2  # index of each block, a mask, positions, tied weight and bias
    assert converted.resized == {}
    assert converted.fresh == []
    lines = converted.lines()
    assert "renamed temp -> temperature" in lines
    name = "vision_encoder.layers.*.blocks.*.attn.relative_position_index"
    assert f"dropped {name}: rebuilt from image and window size (3)" in lines


def test_the_shape_is_read_off_the_tensors(state):
    config = checkpoints.official(state).config
    assert config.vision.image_size == (32, 32)
    assert config.vision.options == {"window_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
    assert (config.text.text_layers, config.text.cross_layers, config.text.heads) == (2, 2, 1)
    assert (config.text.vocab_size, config.text.dim, config.text.feed_forward) == (60, 64, 128)
    assert config.embed_dim == 8
    assert checkpoints.official(state, heads=4).config.text.heads == 4


@pytest.mark.parametrize("wrapped", [True, False])
def test_one_line_loads_a_file(tmp_path, state, wrapped):
    torch.save({"model": state, "config": {"image_res": 32}} if wrapped else state, tmp_path / "official.th")
    model = XVLM.from_pretrained(tmp_path / "official.th")
    assert not model.training
    assert torch.equal(model.box_head[3].bias, state["bbox_head.3.bias"])


def test_another_resolution_resizes_the_tables_and_nothing_else(state):
    plain, larger = checkpoints.official(state), checkpoints.official(state, image_size=48)
    assert larger.config.vision.image_size == (48, 48)
    assert larger.config.vision.options["window_size"] == 6
    assert set(larger.resized) == {name for name in plain.state if "relative_position_bias_table" in name}
    assert larger.resized[TABLE] == ((49, 1), (121, 1))
    for name, tensor in larger.state.items():
        before = plain.state[name]
        expected = resize.relative_positions(before, 6) if name in larger.resized else before
        assert torch.equal(tensor, expected)
    model = checkpoints.build(larger, "x")
    assert model.encode_image(torch.zeros(1, 3, 48, 48)).grid == (6, 6)
    assert sum("121 x" in line for line in larger.lines()) == 2


@pytest.mark.parametrize("size", [40 + 1, 0, -32, 30])
def test_a_resolution_that_the_windows_do_not_fit_is_refused(state, size):
    with pytest.raises(ValueError, match=rf"image size {size}: the trunk sees windows of 4 patches .* multiples of 8"):
        checkpoints.official(state, image_size=size)


def test_leftovers_in_either_direction_are_listed(state):
    for name in ("text_encoder.bert.encoder.layer.1.output.dense.bias", "vision_proj.bias"):
        del state[name]
    state |= {name: torch.zeros(1) for name in ("queue", "vision_encoder.head.weight", "text_encoder.bert.extra")}
    with pytest.raises(ValueError) as refused:
        checkpoints.official(state)
    kind, left, missing = re.split("; |, but ", str(refused.value))
    assert kind == "of kind pretraining (Swin, BERT)"
    assert left == "left over in the file: queue, text_encoder.bert.extra, vision_encoder.head.weight"
    assert missing == "missing from the file: text.layers.1.contract.bias, image_projection.bias"


def test_two_tensors_for_one_place_are_one_too_many(state):
    state["text_encoder.embeddings.LayerNorm.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"left over in the file: text_encoder.(bert.)?embeddings.LayerNorm.bias$"):
        checkpoints.official(state)


def test_a_file_without_what_its_shape_is_read_off_is_refused(state):
    del state["text_encoder.bert.embeddings.position_embeddings.weight"]
    with pytest.raises(ValueError, match=r"missing from the file: text_encoder.bert.embeddings.position_embeddings"):
        checkpoints.official(state)


def test_misshapen_not_finite_and_untied_tensors_are_named(state):
    with pytest.raises(ValueError, match=r"itm_head.3.bias has shape \(3,\), expected \(2,\)"):
        checkpoints.official(state | {"itm_head.3.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"text_projection.bias holds NaN or infinite values"):
        checkpoints.official(state | {"text_proj.bias": torch.full((8,), torch.nan)})
    with pytest.raises(ValueError, match=r"decoder.bias differs from text_encoder.cls.predictions.bias"):
        checkpoints.official(state | {"text_encoder.cls.predictions.decoder.bias": torch.zeros(60)})


def test_a_width_that_does_not_tell_the_heads_asks_for_them():
    state = official.checkpoint(dim=48)
    with pytest.raises(ValueError, match=r"48 wide, not a multiple of 64: say how many attention heads"):
        checkpoints.official(state)
    with pytest.raises(ValueError, match=r"48 wide, which 5 attention heads do not share evenly"):
        checkpoints.official(state, heads=5)
    assert checkpoints.official(state, heads=4).config.text.heads == 4


def test_a_state_dict_of_something_else_is_said_to_be_that(state):
    with pytest.raises(
        ValueError, match=r"not an official checkpoint of X-VLM or ALBEF: no image and text .* among fc"
    ):
        checkpoints.official({"fc.weight": torch.zeros(1)})
    vision = {name: tensor for name, tensor in state.items() if name.startswith("vision_encoder.")}
    with pytest.raises(ValueError, match="not an official checkpoint"):
        checkpoints.official(vision)
    text = official.checkpoint("grounding")
    towers = {name: tensor for name, tensor in text.items() if not name.startswith("bbox_head.")}
    with pytest.raises(ValueError, match="towers without a head: expected one of temp, "):
        checkpoints.official(towers)
    with pytest.raises(ValueError, match="its cls_head is not X-VLM's: ALBEF's NLVR2 and visual entailment models"):
        checkpoints.official(towers | {"cls_head.2.weight": torch.zeros(3, 64)})


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n <!DOCTYPE html><html><title>Quota exceeded</title>", "a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer, not a checkpoint"),
        (b"PK\x03\x04 cut off", "is damaged or no checkpoint"),
        (b"", "is damaged or no checkpoint"),
        ({"model": {"a": torch.zeros(1)}, "more": RunsCode()}, "it needs print, which may run code"),
        ({"model": {}, "config": types.SimpleNamespace()}, "it needs types.SimpleNamespace, which may run code"),
        ([torch.zeros(1)], "expected a state dict of tensors, found list"),
        ({"model": {}}, "expected a state dict of tensors, found dict"),
    ],
)
def test_files_that_are_no_plain_weights_are_refused_in_one_line(tmp_path, capsys, content, reason):
    file = tmp_path / "official.th"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=reason) as refused:
        checkpoints.read(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""
    file = file.with_suffix(".safetensors")
    if isinstance(content, bytes):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"no(t a)? checkpoint"):
            convert.read_checkpoint(file)


def test_the_card_says_where_the_weights_come_from(tmp_path, state):
    file = tmp_path / "16m.th"
    torch.save({"model": state, "config": {"train_file": ["coco.json"], "odd": torch.zeros(1)}}, file)
    converted = checkpoints.read(file, image_size=48, task="vqa")
    model = checkpoints.build(converted, file)
    card = text(model, checkpoints.card(file, converted), "mine")
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    for part in (
        "# mine",
        parameters,
        "8 tensors started fresh",
        "from xvlm.models.decoder import Answerer",
        "16m.th",
        "SHA-256",
        "- coco.json",
        "BSD-3-Clause",
        "3 position tables resized",
    ):
        assert part in card


TINY = [(task, "swin", "(Swin, BERT)") for task in kinds.TASKS]
TINY += [("pretraining", "vit", "(ViT, BERT)")]
TINY += [(task, "clip", "(CLIP-ViT, BERT)") for task in ("pretraining", "vqa")]
TINY += [(task, "roberta", "(Swin, RoBERTa)") for task in ("pretraining", "retrieval", "vqa", "captioning")]
TINY += [(task, "albef", "(ViT, BERT)") for task in ("pretraining", "retrieval", "vqa", "nlvr_pretraining")]


@pytest.mark.parametrize(("task", "towers", "words"), TINY)
def test_every_kind_is_accounted_for_and_loads(tmp_path, task, towers, words):
    roberta, trunk = towers == "roberta", "swin" if towers == "roberta" else towers
    state = official.checkpoint(task, trunk, roberta=roberta)
    torch.save(state, tmp_path / "official.th")
    converted = checkpoints.read(tmp_path / "official.th")
    assert str(converted.kind) == f"{'ALBEF ' * (trunk == 'albef')}{task} {words}"
    assert converted.renamed.keys() | converted.dropped.keys() == state.keys()
    assert not converted.fresh
    unused = "index|mask|position_ids|decoder\\.(weight|bias)|crossattention.self.(key|value)|_m\\.|queue"
    assert all(re.search(unused, name) for name in converted.dropped)
    text = converted.config.text
    assert (text.text_layers, text.cross_layers, text.looks) == (2, 2, 2 if task.startswith("nlvr") else 1)
    assert (text.position_offset, text.norm_eps) == ((2, 1e-5) if roberta else (0, 1e-12))
    made = {"vqa": Answerer, "captioning": Captioner}.get(task, XVLM)
    model = made.from_pretrained(tmp_path / "official.th")
    with torch.no_grad():
        model.save_pretrained(tmp_path / "mine")
    assert golden.differences(checkpoints.load(tmp_path / "mine"), tmp_path / "mine")[1]


@pytest.mark.parametrize("trunk", ["vit", "clip", "albef"])
def test_a_vit_is_read_off_and_takes_other_sizes(trunk):
    state = official.checkpoint(trunk=trunk)
    vision = checkpoints.official(state).config.vision
    assert vision.image_size == (32, 32)
    assert {key: vision.options[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")} == {
        **{"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    }
    assert vision.local_layers == (0 if trunk == "albef" else 1)
    larger = checkpoints.official(state, image_size=48)
    assert larger.resized == {"vision.trunk.pos_embed": ((1, 17, 64), (1, 37, 64))}
    assert checkpoints.build(larger, "x").encode_image(torch.zeros(1, 3, 48, 48)).grid == (6, 6)
    for size in (0, -8, 20):
        with pytest.raises(ValueError, match=rf"image size {size}: patches of 8 pixels"):
            checkpoints.official(state, image_size=size)


def test_what_albef_trains_with_is_dropped_and_its_matching_head_kept():
    state = official.checkpoint(trunk="albef")
    converted = checkpoints.official(state)
    assert converted.config.matching == "linear"
    assert converted.config.heads == tuple(head for head in PRETRAINING_HEADS if head != "box_head")
    assert torch.equal(converted.state["itm_head.weight"], state["itm_head.weight"])
    assert converted.dropped["image_queue"] == "features of past batches, which only training needs"
    assert converted.dropped["text_encoder_m.bert.embeddings.LayerNorm.bias"].startswith("an averaged copy")
    left_over = {name: tensor for name, tensor in state.items() if name != "text_proj.bias"} | {"queue": torch.ones(1)}
    with pytest.raises(ValueError, match=r"left over in the file: queue; missing from the file: text_projection.bias"):
        checkpoints.official(left_over)


STARTED = [("swin", task) for task in kinds.TASKS[1:]]
STARTED += [("clip", "vqa"), ("albef", "retrieval"), ("albef", "grounding"), ("albef", "nlvr")]


@pytest.mark.parametrize(("trunk", "task"), STARTED)
def test_a_pretraining_file_starts_every_task(trunk, task):
    state = official.checkpoint(trunk=trunk)
    started = checkpoints.official(state, task=task)
    assert started.renamed.keys() | started.dropped.keys() == state.keys()
    assert {new for places in started.renamed.values() for new in places} == started.state.keys()
    first_fresh = {"nlvr": "truth_head", "nlvr_pretraining": "assignment_head"}
    first_fresh |= {"vqa": "decoder"} if trunk == "swin" else {}
    first_fresh |= {"grounding": "box_head"} if trunk == "albef" else {}
    assert {name.partition(".")[0] for name in started.fresh} == {first_fresh.get(task)} - {None}
    model = checkpoints.build(started, "x")
    assert type(model).__name__ == {"vqa": "Answerer", "captioning": "Captioner"}.get(task, "XVLM")
    source = "text_encoder.bert.encoder.layer.3.output.dense.bias"
    places = {
        "nlvr": ("cross.layers.2.contract.bias", "cross.layers.3.contract.bias"),
        "vqa": ("cross.layers.1.contract.bias", "decoder.cross.layers.1.contract.bias"),
        "captioning": ("decoder.cross.layers.1.contract.bias",),
    }
    places["nlvr_pretraining"] = places["nlvr"]
    assert started.renamed[source] == places.get(task, ("cross.layers.1.contract.bias",))
    assert all(torch.equal(model.state_dict()[name], state[source]) for name in started.renamed[source])
    assert any("no place for it" in line for line in started.lines())
    assert sum(line.startswith("started fresh ") for line in started.lines()) <= len(started.fresh)


def test_text_assignment_starts_nlvr2_layer_by_layer():
    state = official.checkpoint("nlvr_pretraining")
    started = checkpoints.official(state, task="nlvr")
    own = checkpoints.official(state)
    assert all(tensor is started.state[name] for name, tensor in own.state.items() if name in started.state)
    assert {name.partition(".")[0] for name in started.fresh} == {"truth_head"}
    assert started.dropped["ta_head.bias"] == "a nlvr model has no place for it"


@pytest.mark.parametrize("task", [*kinds.TASKS[1:], "segmentation"])
def test_a_task_that_a_file_does_not_start_is_refused(task):
    state = official.checkpoint("vqa" if task == "captioning" else "captioning")
    expected = {
        "captioning": "a captioning model starts from pretraining",
        "nlvr": "a nlvr model starts from pretraining or nlvr_pretraining",
        "segmentation": "no task 'segmentation'; there are pretraining, retrieval, ",
    }
    with pytest.raises(
        ValueError, match=expected.get(task, rf"kind captioning .*; a {task} model starts from pretrain")
    ):
        checkpoints.official(state, task=task)
    with pytest.raises(ValueError, match="a pretraining model starts from none but its own"):
        checkpoints.official(state, task="pretraining")


def test_an_official_file_of_another_model_is_refused_by_from_pretrained(tmp_path):
    torch.save(official.checkpoint("captioning"), tmp_path / "official.th")
    with pytest.raises(
        ValueError, match=r"official.th: holds .* Captioner: load it with Captioner.from_pretrained, not"
    ):
        XVLM.from_pretrained(tmp_path / "official.th")


def test_untied_keys_of_a_second_look_are_named():
    state = official.checkpoint("nlvr")
    first = "text_encoder.encoder.layer.2.crossattention.self.key.weight"
    second = first.replace("2", "3")
    with pytest.raises(ValueError, match=f"{second} differs from {first}, to which it should be tied"):
        checkpoints.official(state | {second: state[second] + 1})


COMPARED = re.compile(r"word_embeddings|predictions|lm_head|crossattention\.self\.(key|value)|bias_table|pos_embed")


def without_memory(keys: dict) -> official.State:
    """Shapes alone; what is compared with another tensor or resized is zero, stored in a single number."""
    state = {}
    for name, key in keys.items():
        device = "cpu" if COMPARED.search(name) else "meta"
        state[name] = torch.zeros((), dtype=getattr(torch, key["dtype"]), device=device).expand(key["shape"])
    return state


@pytest.fixture(scope="module")
def real(request):
    file = Path(request.config.getoption("--goldens")) / "statedict_real.json"
    if not file.exists():
        pytest.skip(f"no reference shapes in {file}")
    return json.loads(file.read_text())["models"]


REAL = {
    "pretrain_swin224": "pretraining (Swin, BERT)",
    "pretrain_clipvit224": "pretraining (CLIP-ViT, BERT)",
    "pretrain_vit224": "pretraining (ViT, BERT)",
    "pretrain_swin224_roberta": "pretraining (Swin, RoBERTa)",
    "retrieval_swin384": "retrieval (Swin, BERT)",
    "vqa_swin384": "vqa (Swin, BERT)",
    "nlvr_swin384": "nlvr (Swin, BERT)",
    "nlvr_pretrain_swin384": "nlvr_pretraining (Swin, BERT)",
    "grounding_bbox_swin384": "grounding (Swin, BERT)",
    "captioning_swin384": "captioning (Swin, BERT)",
    "captioning_pretrain_swin224": "captioning (Swin, BERT)",
}


@pytest.mark.parametrize("name", REAL)
def test_real_size(real, name):
    state = without_memory(real[name]["keys"])
    converted = checkpoints.official(state)
    assert str(converted.kind) == REAL[name]
    assert converted.renamed.keys() | converted.dropped.keys() == state.keys()
    assert not converted.renamed.keys() & converted.dropped.keys()
    assert sum(tensor.numel() for tensor in converted.state.values()) == real[name]["num_params"]
    text, side = converted.config.text, int(name.partition("_")[2].strip("abcdefghijklmnopqrstuvwxyz_"))
    assert (text.heads, text.text_layers, text.cross_layers) == (12, 6, 6)
    assert converted.config.vision.image_size == (side, side)
    windows = {"window_size": 12} if side == 384 else {}
    assert converted.config.vision.options == windows  # else timm's own
    assert not converted.fresh
    assert not converted.resized


@pytest.mark.parametrize(("name", "size"), [("pretrain_swin224", 384), ("pretrain_swin224", 480), ("vqa_swin384", 480)])
def test_real_size_at_another_resolution(real, name, size):
    state = without_memory(real[name]["keys"])
    table = "vision_encoder.layers.3.blocks.1.attn.relative_position_bias_table"
    state[table] = torch.randn(state[table].shape)
    converted = checkpoints.official(state, image_size=size)
    window = size // 32
    assert converted.config.vision.options == {"window_size": window}
    heads = 2 * 4 + 2 * 8 + 18 * 16 + 2 * 32
    tables = [tensor for name, tensor in converted.state.items() if "bias_table" in name]
    assert len(converted.resized) == len(tables) == 24
    assert sum(map(torch.numel, tables)) == heads * (2 * window - 1) ** 2
    (ours,) = converted.renamed[table]
    assert torch.equal(converted.state[ours], resize.relative_positions(state[table], window))


@pytest.mark.parametrize("name", ["pretrain_vit224", "pretrain_clipvit224"])
def test_real_size_vits_at_another_resolution(real, name):
    state = without_memory(real[name]["keys"])
    (table,) = (name for name in state if name.startswith("vision_encoder.pos_embed"))
    state[table] = torch.randn(state[table].shape)
    converted = checkpoints.official(state, image_size=384)
    expected = resize.absolute_positions(state[table].view(1, 197, 768), (14, 14), (24, 24))
    assert torch.equal(converted.state["vision.trunk.pos_embed"], expected)
    assert converted.resized == {"vision.trunk.pos_embed": ((1, 197, 768), (1, 577, 768))}


# What the public loaders print as missing when each task starts from pre-training; all else is there.
@pytest.mark.parametrize(
    ("task", "like", "fresh"),
    [
        ("vqa", "vqa_swin384", 24),
        ("nlvr", "nlvr_swin384", 6),
        pytest.param("nlvr_pretraining", "nlvr_pretrain_swin384", 2, marks=pytest.mark.slow),
        pytest.param("retrieval", "retrieval_swin384", 0, marks=pytest.mark.slow),
        pytest.param("grounding", "grounding_bbox_swin384", 0, marks=pytest.mark.slow),
        pytest.param("captioning", "captioning_swin384", 0, marks=pytest.mark.slow),
    ],
)
def test_real_size_from_pretraining_to_each_task(real, task, like, fresh):
    state = without_memory(real["pretrain_swin224"]["keys"])
    started = checkpoints.official(state, image_size=384, task=task)
    wanted = checkpoints.official(without_memory(real[like]["keys"]))
    assert started.config == wanted.config
    assert started.state.keys() | set(started.fresh) == wanted.state.keys()
    assert len(started.fresh) == fresh
    assert all(started.state[name].shape == wanted.state[name].shape for name in started.state)
    assert started.renamed.keys() | started.dropped.keys() == state.keys()
    assert {new for places in started.renamed.values() for new in places} == started.state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_size_through_a_folder(real, tmp_path, name):
    torch.manual_seed(0)
    noise = {key: 0.02 * torch.randn(a["shape"]) for key, a in real[name]["keys"].items() if a["dtype"] == "float32"}
    whole = {
        key: torch.zeros(a["shape"], dtype=torch.long) for key, a in real[name]["keys"].items() if key not in noise
    }
    tied = {second: noise[first] for first, second in real[name]["tied"]}
    torch.save({"model": noise | whole | tied, "config": {"image_res": 224}}, tmp_path / "official.th")
    model = checkpoints.load(tmp_path / "official.th")
    assert sum(p.numel() for p in model.parameters()) == real[name]["num_params"]
    model.save_pretrained(tmp_path / "mine")
    assert golden.differences(checkpoints.load(tmp_path / "mine"), tmp_path / "mine")[1]
    shutil.rmtree(tmp_path)


ARRAYS = {
    "pretrain_swin": (PRETRAINING_HEADS, 1),
    "pretrain_swin_roberta": (PRETRAINING_HEADS, 1),
    "pretrain_vit": (PRETRAINING_HEADS, 1),
    "pretrain_clipvit": (PRETRAINING_HEADS, 1),
    "retrieval_swin": (kinds.HEADS["retrieval"], 1),
    "bbox_swin": (kinds.HEADS["grounding"], 1),
    "nlvr_swin": (kinds.HEADS["nlvr"], 2),
    "nlvr_pretrain_swin": (kinds.HEADS["nlvr_pretraining"], 2),
    "vqa_swin": (None, 1),
    "captioning_swin": (None, 1),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_the_shape_of_the_reference_models_is_found(goldens, case):
    folder = goldens / case
    manifest, (heads, looks) = read(folder / "manifest.json"), ARRAYS[case]
    text = text_config(manifest["text_config"]).model_copy(update={"looks": looks})
    config = checkpoints.official(load_file(folder / "state.safetensors"), heads=text.heads).config
    assert config.text == text
    if manifest["config"]["use_swin"]:
        assert config.vision == vision_config(manifest["config"], manifest["vision_config"])
    if heads is not None:
        assert config.heads == heads
    elif case == "vqa_swin":
        assert config.decoder_layers == manifest["config"]["num_dec_layers"]


@pytest.mark.parametrize("case", [case for case in ARRAYS if case.startswith("pretrain")])
def test_reference_arrays_through_a_file(goldens, tmp_path, case):
    folder = goldens / case
    torch.save({"model": load_file(folder / "state.safetensors")}, tmp_path / "official.th")
    shape = read(folder / "manifest.json")["text_config"]
    converted = checkpoints.read(tmp_path / "official.th", heads=shape["num_attention_heads"])
    model = checkpoints.build(converted, "official.th")
    given, expected = (np.load(folder / file) for file in ("inputs.npz", "outputs.npz"))
    texts = Texts(torch.from_numpy(given["img_text_ids"]), torch.from_numpy(given["img_text_atts"]).bool())
    with torch.no_grad():
        image = model.embed_image(model.encode_image(torch.from_numpy(given["img_image"])))
        text = model.embed_text(model.encode_text(texts))
    torch.testing.assert_close(image, torch.from_numpy(expected["img_image_feat"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, torch.from_numpy(expected["img_text_feat"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("trunk", "table", "ours", "name"),
    [
        ("swin", "vision_encoder.layers.1.blocks.0.attn.relative_position_bias_table", None, "rel_4_6"),
        ("vit", "vision_encoder.pos_embed", "vision.trunk.pos_embed", "pos_4_6"),
        ("clip", "vision_encoder.pos_embed.weight", "vision.trunk.pos_embed", "pos_4_6"),
        ("albef", "visual_encoder.pos_embed", "vision.trunk.pos_embed", "pos_4_6"),
    ],
)
def test_tables_are_resized_to_the_reference_arrays(goldens, trunk, table, ours, name):
    given, expected = (np.load(goldens / "load_interpolate" / file) for file in ("inputs.npz", "outputs.npz"))
    if name not in expected:
        pytest.skip(f"no table {name} in {goldens}")
    given, expected = given[name], expected[name]
    state = official.checkpoint(trunk=trunk)
    given, expected = torch.from_numpy(given), torch.from_numpy(expected)
    if ours:  # eight positions of the ViT's 64 dimensions are the reference's
        state[table].view(-1, 64)[:, :8] = given[0]
    else:
        state[table], ours = given, "vision.trunk.layers.1.blocks.0.attn.relative_position_bias_table"
    found = checkpoints.official(state, image_size=48).state[ours][..., : expected.shape[-1]]
    # To the last bit of float32, which rounding in another linear algebra library may turn.
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=2e-7)
