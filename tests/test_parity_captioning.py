"""Captions give the numbers and the words of the public reference: arrays written by its own code, at tiny sizes."""

import re

import pytest
import torch
from reference import Golden, same_names_and_shapes, swin, whole_images

from xvlm.models.decoder import Captioner, CaptionerConfig
from xvlm.models.generation import GenerationConfig
from xvlm.tasks.captioning import CaptioningConfig, Task
from xvlm.types import Batch, Texts

GOLDENS = {"golden": ("captioning_swin",)}


@pytest.fixture(scope="module")
def model(golden) -> Captioner:
    return golden.load(Captioner(CaptionerConfig(vision=golden.vision, text=golden.text)))


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    given = golden.inputs
    regions = whole_images(len(given["image"]), golden.size)
    return Batch(given["image"], Texts(given["text_ids"], given["text_atts"].bool()), regions)


def test_logits(golden, model, batch):
    logits = model.decoder(batch.texts, *Task(CaptioningConfig(), model).look(batch))
    golden.close("logits", logits, batch.texts.mask)


def test_loss_and_gradients(golden, model, batch):
    config = CaptioningConfig(
        prompt_tokens=golden.manifest["prompt_length"], label_smoothing=golden.config["label_smoothing"]
    )
    model.zero_grad()
    (loss,) = Task(config, model)({"captioning": batch}).values()
    golden.loss("loss", loss)
    loss.backward()
    golden.gradients(model)


def test_pretraining_loss(golden, model, batch):
    (loss,) = Task(CaptioningConfig(prompt_tokens=1, label_smoothing=0), model)({"captioning": batch}).values()
    golden.loss("pre_loss", loss)


def search_of(golden: Golden, name: str) -> GenerationConfig:
    """``greedy``, or a number of beams and perhaps a repetition penalty: ``beam3_rp1.5``."""
    longest = golden.config["max_length"]
    if name == "greedy":
        return GenerationConfig(beams=1, max_tokens=longest, min_tokens=0, close=True)
    beams, penalty = re.fullmatch(r"beam(\d+)(?:_rp([\d.]+))?", name).groups()
    shortest = golden.config["min_length"]
    return GenerationConfig(
        beams=int(beams), max_tokens=longest, min_tokens=shortest, repetition_penalty=float(penalty or 1)
    )


def test_generation(golden, model, batch):
    end = golden.inputs["text_ids"][0][golden.inputs["text_atts"][0].bool()][-1].item()
    names = [name.removesuffix("_ids") for name in golden.outputs if name.endswith("_ids")]
    assert "greedy" in names and len(names) > 1
    for name in names:
        task = Task(CaptioningConfig(generation=search_of(golden, name)), model)
        written = task.predict(batch, golden.inputs["prompt_ids"][0], end)
        golden.same(f"{name}_ids", written.texts.ids)
        assert torch.equal(written.texts.mask, written.texts.ids != golden.config["pad_token_id"])
        for score in (f"{name}_logprobs", f"{name}_scores"):
            if score in golden.outputs:
                golden.close(score, written.scores)


@pytest.mark.parametrize(("name", "size"), [("captioning_pretrain_swin224", 224), ("captioning_swin384", 384)])
def test_names_and_shapes_at_full_size(goldens, name, size):
    same_names_and_shapes(goldens, name, lambda: Captioner(CaptionerConfig(vision=swin(size))))
