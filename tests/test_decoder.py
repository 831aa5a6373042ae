"""Models that write: no word sees a later one, nothing is computed twice, answers rank as brute force ranks them."""

from dataclasses import fields

import pytest
import tiny
import torch

from xvlm.models.decoder import Answerer, Captioner, Writing, as_concepts, next_words
from xvlm.models.generation import GenerationConfig
from xvlm.tasks import captioning, vqa
from xvlm.types import Batch, Texts, Words

END = 3


def captioner() -> Captioner:
    return Captioner.of(tiny.model()).eval()


def answerer() -> Answerer:
    return Answerer.of(tiny.model(), decoder_layers=2).eval()


def ended(batch: Batch) -> Texts:
    ids = batch.texts.ids.clone()
    ids[torch.arange(len(ids)), batch.texts.mask.sum(1) - 1] = END
    return Texts(ids, batch.texts.mask)


def asked(images: int = 3) -> tuple[Batch, vqa.AnsweredBatch]:
    questions, said = tiny.batch(images, per_image=2), tiny.batch(4, per_image=2, seed=7)
    kept = {field.name: getattr(questions, field.name) for field in fields(Batch)}
    question = torch.arange(8) % len(questions.texts.ids)
    return questions, vqa.AnsweredBatch(**kept, answers=ended(said), question=question, weights=torch.rand(8))


def test_later_words_change_nothing_earlier():
    model, batch = captioner(), tiny.batch()
    look = captioning.Task(captioning.CaptioningConfig(), model).look(batch)
    for cut in range(1, 9):
        ids = batch.texts.ids.clone()
        ids[:, cut:] = 7
        early = (torch.arange(9) < cut)[batch.texts.mask.nonzero()[:, 1]]
        before, after = (model.decoder(Texts(i, batch.texts.mask), *look) for i in (batch.texts.ids, ids))
        torch.testing.assert_close(before[early], after[early], atol=1e-5, rtol=1e-5)
        if cut < 8:
            assert not torch.allclose(before[~early], after[~early], atol=1e-3)


def test_asking_for_some_words_gives_what_asking_for_all_gives():
    model, batch = captioner(), tiny.batch()
    look = captioning.Task(captioning.CaptioningConfig(), model).look(batch)
    only, words = next_words(batch.texts, 2)
    lengths = batch.texts.mask.sum(1)
    assert torch.equal(words, torch.cat([row[2:n] for row, n in zip(batch.texts.ids, lengths, strict=True)]))
    everything = model.decoder(batch.texts, *look)
    torch.testing.assert_close(
        model.decoder(batch.texts, *look, only=only), everything[only[batch.texts.mask]], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["caption", "answer"])
def test_writing_on_gives_what_reading_anew_gives(kind):
    batch = tiny.batch()
    if kind == "caption":
        model = captioner()
        concepts, about = captioning.Task(captioning.CaptioningConfig(), model).look(batch)
    else:
        model = answerer()
        _, concepts = model.read(batch.images, batch.texts, batch.regions)
        about = torch.arange(9)
    rows = about.repeat_interleave(2)
    writing = Writing(model.decoder, concepts, rows)
    ids, continued = torch.randint(5, 60, (18, 3)), torch.arange(18)
    for _ in range(4):
        only = torch.zeros_like(ids, dtype=torch.bool)
        only[:, -1] = True
        anew = model.decoder(Texts(ids, torch.ones_like(only)), concepts, rows, only=only)
        torch.testing.assert_close(writing(ids, continued), anew, atol=1e-5, rtol=1e-5)
        continued = continued.view(9, 2)[:, torch.randint(0, 2, (2,))].flatten()  # beams of the same concept
        ids = torch.cat([ids[continued], torch.randint(5, 60, (18, 1))], 1)


def test_a_text_as_a_concept_is_all_its_words():
    batch = tiny.batch()
    words = tiny.model().encode_text(batch.texts)
    concepts = as_concepts(words)
    seen = torch.cat([concepts.pooled[:, None], concepts.patches], 1)
    mask = torch.nn.functional.pad(concepts.mask, (1, 0), value=True)
    assert torch.equal(seen[mask], words.states)
    assert torch.equal(mask, words.mask)
    of_one_word = as_concepts(Words(words.first, words.mask[:, :1]))
    assert of_one_word.patches.shape[1] == 0


@torch.no_grad()
def brute_force(task: vqa.Task, batch: Batch, answers: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer's first word, and of all its words, each pair run alone."""
    _, questions = task.model.read(batch.images, batch.texts, batch.regions)
    first, whole = torch.zeros(2, len(batch.texts.ids), len(answers.ids))
    for q in range(len(first)):
        for a in range(first.shape[1]):
            ids = answers.ids[a][answers.mask[a]][None]
            logits = task.model.decoder(
                Texts(ids, torch.ones_like(ids, dtype=torch.bool)), questions, torch.tensor([q])
            )
            log_p = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            first[q, a], whole[q, a] = log_p[0], log_p.sum()
    return first, whole


@pytest.mark.parametrize("twice", [False, True])
def test_ranking_is_what_brute_force_gives(twice):
    batch, answered = asked()
    for kept in (3, 100):
        task = vqa.Task(vqa.VqaConfig(candidates=kept, first_word_twice=twice), answerer())
        first, whole = brute_force(task, batch, answered.answers)
        scores = whole + first if twice else whole
        left_out = first < first.topk(min(kept, 8)).values[:, -1:]
        expected = scores.masked_fill(left_out, -torch.inf).softmax(1).sort(1, descending=True)
        ranking = task.predict(batch, answered.answers)
        assert torch.equal(ranking.answers, expected.indices[:, : min(kept, 8)])
        torch.testing.assert_close(ranking.probabilities, expected.values[:, : min(kept, 8)], atol=1e-5, rtol=1e-4)


def test_the_loss_of_answers_weighs_each_and_counts_questions():
    batch, answered = asked()
    task = vqa.Task(vqa.VqaConfig(), answerer())
    _, whole = brute_force(task, batch, answered.answers)
    of_its_question = whole[answered.question, torch.arange(8)]
    (loss,) = task({"vqa": answered.to("cpu")}).values()
    torch.testing.assert_close(loss, -(answered.weights * of_its_question).sum() / 6)


def test_a_captioner_learns_to_tell_regions_apart():
    model, batch = captioner(), tiny.batch(2, per_image=2)
    texts = Texts(torch.tensor([[2, 10, 20 + i, 30 + i, END] for i in range(4)]), torch.ones(4, 5, dtype=torch.bool))
    batch = Batch(batch.images, texts, batch.regions)
    generation = GenerationConfig(max_tokens=8, min_tokens=3)
    task = captioning.Task(captioning.CaptioningConfig(prompt_tokens=2, generation=generation), model)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (loss,) = task({"caption": batch}).values()
        loss.backward()
        optimizer.step()
    assert torch.equal(task.predict(batch, texts.ids[0, :2], END).texts.ids, texts.ids)


def test_an_answerer_writes_where_there_is_no_list():
    batch, _ = asked()
    written = vqa.Task(vqa.VqaConfig(generation=GenerationConfig(max_tokens=6, min_tokens=2)), answerer()).write(
        batch, END
    )
    assert len(written.texts.ids) == len(batch.texts.ids)
    assert torch.equal(written.texts.ids[:, 0], batch.texts.ids[:, 0])
