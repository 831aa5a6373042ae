"""Golden outputs: written with the weights, small, and far off as soon as anything about the model is."""

import json
from functools import partial

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from xvlm import hub
from xvlm.models import golden
from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.xvlm import XVLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_folder_answers_as_it_did(tmp_path, dtype):
    tiny.model().save_pretrained(tmp_path, dtype=dtype)
    largest, near = golden.differences(XVLM.from_pretrained(tmp_path), tmp_path)
    assert near
    assert set(largest) == {"fused", "image_embedding", "text_embedding", "matching", "boxes_cxcywh", "words"}
    assert set(largest.values()) == {0.0}
    assert (tmp_path / golden.FILE).stat().st_size < 10_000


def test_saving_draws_no_random_numbers_and_keeps_the_mode(tmp_path):
    model = tiny.model().train()
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("start", [Captioner.of, partial(Answerer.of, decoder_layers=1)])
def test_models_that_write_are_kept_alike(tmp_path, start):
    model = start(tiny.model()).eval()
    model.save_pretrained(tmp_path)
    kept = type(model).from_pretrained(tmp_path)
    assert not kept.training
    assert kept.config == model.config
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert set(golden.differences(kept, tmp_path)[0].values()) == {0.0}
    parts = {name.rpartition(".layers.")[0] or name.rpartition(".")[0] for name, _ in kept.named_parameters()}
    for part in parts:
        moved = type(model).from_pretrained(tmp_path)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name.startswith(f"{part}."):
                    parameter += 0.05 * torch.randn_like(parameter)
        assert not golden.differences(moved, tmp_path)[1], part
    state = load_file(tmp_path / "model.safetensors")
    del state["decoder.word_head.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: missing decoder.word_head.bias$"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_says_which_model_it_holds(tmp_path):
    Captioner.of(tiny.model()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "Captioner"
    for other in (XVLM, Answerer):
        with pytest.raises(
            ValueError, match=rf"kind Captioner: load it with Captioner.from_pretrained, not {other.__name__}"
        ):
            other.from_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"kind XVLM: load it with XVLM.from_pretrained, not Captioner's"):
        Captioner.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"], config["matching"]  # as it was when there was no other kind
    (tmp_path / "config.json").write_text(json.dumps(config | {"schema": 1}))
    assert golden.differences(XVLM.from_pretrained(tmp_path), tmp_path)[1]


PARTS = ["vision", "text", "cross", "word_head", "image_projection", "text_projection", "itm_head", "box_head"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_model_is_heard(tmp_path, part):
    tiny.model().save_pretrained(tmp_path)
    model = XVLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(f"{part}."):
                parameter += 0.05 * torch.randn_like(parameter)
    largest, near = golden.differences(model, tmp_path)
    assert not near
    assert max(largest.values()) > 1e-3


def test_another_reading_of_the_same_weights_is_found(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text"]["heads"] = 4  # the same tensors, other numbers
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not golden.differences(XVLM.from_pretrained(tmp_path), tmp_path)[1]


def test_weights_that_changed_are_found_however_little_they_say(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"temperature": state["temperature"] * 2}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: changed since golden.safetensors was written"):
        golden.differences(XVLM.from_pretrained(tmp_path), tmp_path)


def test_goldens_that_are_missing_or_not_a_number(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    model = XVLM.from_pretrained(tmp_path)
    kept = load_file(tmp_path / golden.FILE)
    save_file(kept | {"matching": torch.full_like(kept["matching"], torch.nan)}, tmp_path / golden.FILE)
    assert not golden.differences(model, tmp_path)[1]
    save_file({"matching": kept["matching"]}, tmp_path / golden.FILE)
    with pytest.raises(ValueError, match=r"golden.safetensors: holds .* but this model gives"):
        golden.differences(model, tmp_path)
    (tmp_path / golden.FILE).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"golden.safetensors: not loaded, because it .* is damaged"):
        golden.differences(model, tmp_path)
    (tmp_path / golden.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no golden.safetensors; save_pretrained writes it"):
        golden.differences(model, tmp_path)


@pytest.mark.parametrize("name", hub.shipped())
def test_shipped_weights_answer_as_they_did(name):
    folder = hub.locate(name)
    assert golden.differences(XVLM.from_pretrained(folder), folder)[1]
