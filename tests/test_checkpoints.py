"""Official checkpoint files become ours whole or not at all."""

import json
import types
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from safetensors.torch import load_file

from xvlm.models import checkpoints, convert, resize
from xvlm.models.xvlm import XVLM
from xvlm.types import Texts

TABLE = "vision.trunk.layers.0.blocks.0.attn.relative_position_bias_table"
UNKNOWN = "so far only pre-training \\(Swin, BERT\\) is supported"


@pytest.fixture
def state() -> official.State:
    return official.checkpoint()


def test_every_tensor_is_renamed_or_dropped_for_a_reason(state):
    converted = checkpoints.official(state)
    assert converted.renamed.keys() | converted.dropped.keys() == state.keys()
    assert not converted.renamed.keys() & converted.dropped.keys()
    assert len(set(converted.renamed.values())) == len(converted.renamed) == len(converted.state)
    for name, new in converted.renamed.items():
        assert converted.state[new] is state[name]
    assert len(converted.dropped) == 3 + 1 + 1 + 2  # index of each block, a mask, positions, tied weight and bias
    assert converted.resized == {}
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
    left, missing = str(refused.value).split("; ")
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


def test_a_state_dict_of_something_else_is_said_to_be_that():
    with pytest.raises(
        ValueError, match="not an official X-VLM checkpoint: no tensor of a known vision_encoder among fc"
    ):
        checkpoints.official({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"kind ALBEF; {UNKNOWN}"):
        checkpoints.official({"visual_encoder.cls_token": torch.zeros(1)})


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
    card = checkpoints.card("mine", file, checkpoints.read(file, image_size=48))
    for part in ("# mine", "16m.th", "SHA-256", "- coco.json", "BSD-3-Clause", "3 position tables were resized"):
        assert part in card


def without_memory(keys: dict) -> official.State:
    """Zeros of any size, each stored in a single number."""
    return {name: torch.zeros((), dtype=getattr(torch, k["dtype"])).expand(k["shape"]) for name, k in keys.items()}


@pytest.fixture(scope="module")
def real(request):
    file = Path(request.config.getoption("--goldens")) / "statedict_real.json"
    if not file.exists():
        pytest.skip(f"no reference shapes in {file}")
    return json.loads(file.read_text())["models"]


@pytest.mark.parametrize(("size", "window"), [(None, 7), (384, 12), (480, 15)])
def test_real_size(real, size, window):
    state = without_memory(real["pretrain_swin224"]["keys"])
    converted = checkpoints.official(state, image_size=size)
    assert converted.renamed.keys() | converted.dropped.keys() == state.keys()
    assert converted.config.vision.options == ({} if size is None else {"window_size": window})
    assert (converted.config.text.heads, converted.config.text.text_layers, converted.config.text.cross_layers) == (
        12,
        6,
        6,
    )
    tables = sum(t.numel() for name, t in converted.state.items() if "bias_table" in name)
    heads = 2 * 4 + 2 * 8 + 18 * 16 + 2 * 32
    assert tables == heads * (2 * window - 1) ** 2
    assert sum(t.numel() for t in converted.state.values()) - tables + heads * 169 == 215_637_241
    assert len(converted.resized) == (0 if size is None else 24)


def test_other_kinds_are_named_and_refused(real):
    kinds = {
        "pretrain_swin224": "pre-training (Swin, BERT)",
        "pretrain_clipvit224": "pre-training (CLIP-ViT, BERT)",
        "pretrain_vit224": "pre-training (ViT, BERT)",
        "pretrain_swin224_roberta": "pre-training (Swin, RoBERTa)",
        "retrieval_swin384": "retrieval (Swin, BERT)",
        "vqa_swin384": "VQA (Swin, BERT)",
        "nlvr_swin384": "NLVR2 (Swin, BERT)",
        "nlvr_pretrain_swin384": "NLVR2 pre-training (Swin, BERT)",
        "grounding_bbox_swin384": "box grounding (Swin, BERT)",
        "captioning_swin384": "captioning (Swin, BERT)",
        "captioning_pretrain_swin224": "captioning (Swin, BERT)",
    }
    states = {name: without_memory(model["keys"]) for name, model in real.items()}
    assert {name: checkpoints.kind(state) for name, state in states.items()} == kinds
    for name, state in states.items():
        if name != "pretrain_swin224":
            with pytest.raises(ValueError, match=UNKNOWN):
                checkpoints.official(state)


def test_reference_arrays_through_a_file(goldens, tmp_path):
    folder = goldens / "pretrain_swin"
    torch.save({"model": load_file(folder / "state.safetensors")}, tmp_path / "official.th")
    shape = json.loads((folder / "manifest.json").read_text())["text_config"]
    model = checkpoints.load(tmp_path / "official.th", heads=shape["num_attention_heads"])
    given, expected = (np.load(folder / file) for file in ("inputs.npz", "outputs.npz"))
    texts = Texts(torch.from_numpy(given["img_text_ids"]), torch.from_numpy(given["img_text_atts"]).bool())
    with torch.no_grad():
        image = model.embed_image(model.encode_image(torch.from_numpy(given["img_image"])))
        text = model.embed_text(model.encode_text(texts))
    torch.testing.assert_close(image, torch.from_numpy(expected["img_image_feat"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, torch.from_numpy(expected["img_text_feat"]), atol=1e-5, rtol=1e-4)
