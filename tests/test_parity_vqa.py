"""Questions and answers give the numbers of the public reference: arrays written by its own code, at tiny sizes."""

import pytest
import torch
from reference import same_names_and_shapes, swin, whole_images

from xvlm import losses
from xvlm.models.decoder import Answerer, AnswererConfig, next_words
from xvlm.tasks.vqa import AnsweredBatch, Task, VqaConfig
from xvlm.types import Texts

GOLDENS = {"golden": ("vqa_swin",)}


@pytest.fixture(scope="module")
def task(golden) -> Task:
    layers = golden.config["num_dec_layers"]
    model = Answerer(AnswererConfig(vision=golden.vision, text=golden.text, decoder_layers=layers))
    return Task(VqaConfig(candidates=golden.manifest["k_test"]), golden.load(model))


@pytest.fixture(scope="module")
def batch(golden) -> AnsweredBatch:
    given = golden.inputs
    return AnsweredBatch(
        given["image"],
        Texts(given["question_ids"], given["question_atts"].bool()),
        whole_images(len(given["image"]), golden.size),
        answers=Texts(given["answer_ids"], given["answer_atts"].bool()),
        question=torch.arange(len(given["k"])).repeat_interleave(given["k"]),
        weights=given["weights"],
    )


def test_outputs(golden, task, batch):
    answers = batch.answers
    states, questions = task.model.read(batch.images, batch.texts, batch.regions)
    golden.close("question_states", states.states, batch.texts.mask)
    logits = task.model.decoder(answers, questions, batch.question)
    golden.close("answer_logits", logits, answers.mask)
    only, words = next_words(answers)
    of_words = losses.next_words(logits[only[answers.mask]], words)
    golden.close("answer_losses", torch.zeros(len(answers.ids)).index_add(0, only.nonzero()[:, 0], of_words))


def test_loss_and_gradients(golden, task, batch):
    task.zero_grad()
    (loss,) = task({"vqa": batch}).values()
    golden.loss("loss", loss)
    loss.backward()
    golden.gradients(task.model)


def test_ranking(golden, task, batch):
    ranking = task.predict(batch, Texts(golden.inputs["cand_ids"], golden.inputs["cand_atts"].bool()))
    golden.same("topk_ids", ranking.answers)
    golden.close("topk_probs", ranking.probabilities)


def test_names_and_shapes_at_full_size(goldens):
    same_names_and_shapes(goldens, "vqa_swin384", lambda: Answerer(AnswererConfig(vision=swin(384))))
