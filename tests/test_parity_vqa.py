"""Questions and answers give the numbers of the public reference: arrays written by its own code, at tiny sizes."""

from pathlib import Path

import pytest
import torch
from golden_decoders import Golden, same_names_and_shapes, starts_as_the_reference, swin, whole_images
from test_parity import close, same_loss, text_config, vision_config

from xvlm import losses
from xvlm.models.decoder import Answerer, AnswererConfig, next_words
from xvlm.tasks.vqa import AnsweredBatch, Task, VqaConfig
from xvlm.types import Texts


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden(Path(request.config.getoption("--goldens")) / "vqa_swin")


@pytest.fixture(scope="module")
def task(golden) -> Task:
    config, text = golden.manifest["config"], text_config(golden.manifest["text_config"])
    vision = vision_config(config, golden.manifest["vision_config"])
    model = Answerer(AnswererConfig(vision=vision, text=text, decoder_layers=config["num_dec_layers"]))
    golden.load(model)
    return Task(VqaConfig(candidates=golden.manifest["k_test"]), model)


@pytest.fixture(scope="module")
def batch(golden) -> AnsweredBatch:
    given = golden.inputs
    return AnsweredBatch(
        given["image"],
        Texts(given["question_ids"], given["question_atts"].bool()),
        whole_images(len(given["image"]), given["image"].shape[-1]),
        answers=Texts(given["answer_ids"], given["answer_atts"].bool()),
        question=torch.arange(len(given["k"])).repeat_interleave(given["k"]),
        weights=given["weights"],
    )


def test_outputs(golden, task, batch):
    expected, answers = golden.outputs, batch.answers
    states, questions = task.model.read(batch.images, batch.texts, batch.regions)
    close(states.states, expected["question_states"][batch.texts.mask], "question_states")
    logits = task.model.decoder(answers, questions, batch.question)
    close(logits, expected["answer_logits"][answers.mask], "answer_logits")
    only, words = next_words(answers)
    of_words = losses.next_words(logits[only[answers.mask]], words)
    of_answers = torch.zeros(len(answers.ids)).index_add(0, only.nonzero()[:, 0], of_words)
    close(of_answers, expected["answer_losses"], "answer_losses")


def test_loss_and_gradients(golden, task, batch):
    task.zero_grad()
    (loss,) = task({"vqa": batch}).values()
    same_loss(loss, golden.outputs["loss"])
    loss.backward()
    golden.same_gradients(task.model)


def test_ranking(golden, task, batch):
    ranking = task.predict(batch, Texts(golden.inputs["cand_ids"], golden.inputs["cand_atts"].bool()))
    assert torch.equal(ranking.answers, golden.outputs["topk_ids"])
    close(ranking.probabilities, golden.outputs["topk_probs"], "topk_probs")


def test_what_an_answerer_takes_from_pretraining(golden):
    layers = golden.manifest["config"]["num_dec_layers"]
    starts_as_the_reference(golden, lambda model: Answerer.of(model, layers), "vqa")


def test_names_and_shapes_at_full_size(goldens):
    same_names_and_shapes(goldens, "vqa_swin384", lambda: Answerer(AnswererConfig(vision=swin(384))))
