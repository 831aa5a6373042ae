"""Captions give the numbers and the words of the public reference: arrays written by its own code, at tiny sizes."""

from pathlib import Path

import pytest
import torch
from golden_decoders import Golden, same_names_and_shapes, starts_as_the_reference, swin, whole_images
from test_parity import close, same_loss, text_config, vision_config

from xvlm.models.decoder import Captioner, CaptionerConfig
from xvlm.models.generation import GenerationConfig
from xvlm.tasks.captioning import CaptioningConfig, Task
from xvlm.types import Batch, Texts


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden(Path(request.config.getoption("--goldens")) / "captioning_swin")


@pytest.fixture(scope="module")
def model(golden) -> Captioner:
    manifest = golden.manifest
    vision = vision_config(manifest["config"], manifest["vision_config"])
    made = Captioner(CaptionerConfig(vision=vision, text=text_config(manifest["text_config"])))
    golden.load(made)
    return made


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    given = golden.inputs
    regions = whole_images(len(given["image"]), given["image"].shape[-1])
    return Batch(given["image"], Texts(given["text_ids"], given["text_atts"].bool()), regions)


def test_logits(golden, model, batch):
    logits = model.decoder(batch.texts, *Task(CaptioningConfig(), model).look(batch))
    close(logits, golden.outputs["logits"][batch.texts.mask], "logits")


def test_loss_and_gradients(golden, model, batch):
    manifest = golden.manifest
    config = CaptioningConfig(
        prompt_tokens=manifest["prompt_length"], label_smoothing=manifest["config"]["label_smoothing"]
    )
    model.zero_grad()
    (loss,) = Task(config, model)({"captioning": batch}).values()
    same_loss(loss, golden.outputs["loss"])
    loss.backward()
    golden.same_gradients(model)


def test_pretraining_loss(golden, model, batch):
    (loss,) = Task(CaptioningConfig(prompt_tokens=1, label_smoothing=0), model)({"captioning": batch}).values()
    same_loss(loss, golden.outputs["pre_loss"])


SEARCHES = {
    "greedy": GenerationConfig(beams=1, min_tokens=0, close=True),
    "beam1": GenerationConfig(beams=1),
    "beam3": GenerationConfig(beams=3),
    "beam3_rp1.5": GenerationConfig(beams=3, repetition_penalty=1.5),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_generation(golden, model, batch, name):
    task = Task(CaptioningConfig(generation=SEARCHES[name]), model)
    end = golden.inputs["text_ids"][0][golden.inputs["text_atts"][0].bool()][-1].item()
    written = task.predict(batch, golden.inputs["prompt_ids"][0], end)
    assert torch.equal(written.texts.ids, golden.outputs[f"{name}_ids"])
    assert torch.equal(written.texts.mask, written.texts.ids != 0)
    scores = {"greedy": "greedy_logprobs", "beam3": "beam3_scores"}
    if name in scores:
        close(written.scores, golden.outputs[scores[name]], scores[name])


def test_what_a_captioner_takes_from_pretraining(golden):
    starts_as_the_reference(golden, Captioner.of, "captioning")


@pytest.mark.parametrize(("name", "size"), [("captioning_pretrain_swin224", 224), ("captioning_swin384", 384)])
def test_names_and_shapes_at_full_size(goldens, name, size):
    same_names_and_shapes(goldens, name, lambda: Captioner(CaptionerConfig(vision=swin(size))))
