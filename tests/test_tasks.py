"""Fine-tuning tasks on noise: what is a right answer, what is drawn, what may be asked."""

from dataclasses import fields, replace

import pytest
import tiny
import torch

from xvlm import losses
from xvlm.boxes import xyxy_to_cxcywh
from xvlm.grounder import Method
from xvlm.tasks import grounding, nlvr, retrieval
from xvlm.tasks.nlvr import Assignment, NlvrConfig, Statements
from xvlm.types import Regions


def two_look_model(*heads: str):
    text = tiny.TEXT.model_copy(update={"looks": 2})
    return tiny.model(tiny.CONFIG.model_copy(update={"text": text, "heads": heads}))


def statements(batch, about) -> Statements:
    return Statements(batch.images, batch.texts, about, torch.ones(len(about), dtype=torch.bool))


# Retrieval.


def test_captions_of_one_image_are_right_answers_to_each_other(monkeypatch):
    """An image with two captions is the same as that image twice under one name."""
    batch = tiny.batch(4, whole=True)
    names, image = ("a", "b", "a", "c"), torch.tensor([0, 1, 0, 2])
    once = replace(batch, images=batch.images[[0, 1, 3]], regions=replace(batch.regions, image=image))
    once = replace(once, ids=("a", "b", "c"))
    twice = replace(batch, images=batch.images[[0, 1, 0, 3]], ids=names)
    forbidden = []
    negatives = (torch.arange(4), torch.tensor([1, 0, 3, 2]), torch.arange(4), torch.tensor([3, 2, 1, 0]))
    monkeypatch.setattr(losses, "hard_negatives", lambda *given: (forbidden.append(given[3]), negatives)[1])
    task = retrieval.Task(retrieval.RetrievalConfig(), tiny.model())
    found = [task({"caption": each}) for each in (once, twice)]
    assert torch.equal(forbidden[0], torch.tensor([[name == other for other in names] for name in names]))
    assert torch.equal(*forbidden)
    for name in ("caption/itc", "caption/itm"):
        torch.testing.assert_close(found[0][name], found[1][name])


def test_a_loss_of_weight_zero_is_not_computed():
    batch = tiny.batch(3, whole=True)
    task = retrieval.Task(retrieval.RetrievalConfig(itm=0), tiny.model())
    assert task({"caption": batch}).keys() == {"caption/itc"}


def test_the_match_of_a_pair_does_not_depend_on_its_batch():
    batch = tiny.batch(3)
    task = retrieval.Task(retrieval.RetrievalConfig(), tiny.model())
    part = {f.name: getattr(batch.regions, f.name)[:3] for f in fields(batch.regions)}
    texts = replace(batch.texts, ids=batch.texts.ids[:3], mask=batch.texts.mask[:3])
    first = replace(batch, images=batch.images[:1], texts=texts, regions=Regions(**part))
    torch.testing.assert_close(task.predict(batch)[:3], task.predict(first), atol=1e-5, rtol=1e-5)


# Grounding.


def test_whole_images_teach_no_boxes():
    batch = tiny.batch(2, 3)
    task = grounding.Task(
        grounding.GroundingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"heads": ("box_head",)}))
    )
    elsewhere = torch.where(batch.regions.whole[:, None], torch.rand(6, 4), batch.regions.boxes_cxcywh)
    moved = replace(batch, regions=replace(batch.regions, boxes_cxcywh=elsewhere))
    assert task({"region": batch}) == task({"region": moved})
    none = replace(batch, regions=replace(batch.regions, whole=torch.ones(6, dtype=torch.bool)))
    assert all(loss == 0 for loss in task({"region": none}).values())


def test_a_grounder_can_ask_the_task():
    batch = tiny.batch(2, 3)
    task = grounding.Task(grounding.GroundingConfig(), tiny.model())
    assert isinstance(task, Method)
    found = task.predict(batch)
    words, concepts = task.model.encode_text(batch.texts), task.encode(batch.images)
    expected = task.model.locate(task.model.fuse(words, concepts, batch.regions.image))
    for one, box in zip(found, expected, strict=True):
        assert one.presence is None and one.scores.tolist() == [1]
        torch.testing.assert_close(xyxy_to_cxcywh(one.boxes_xyxy)[0], box, atol=1e-4, rtol=1e-4)


def test_other_boxes_are_of_the_same_image_and_apart():
    near, far = [0.1, 0.1, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]
    boxes_cxcywh = torch.tensor([near, near, far, [0.5, 0.5, 1.0, 1.0], near, near])
    whole = torch.tensor([False, False, False, True, False, False])
    regions = Regions(torch.tensor([0, 0, 0, 0, 1, 1]), boxes_cxcywh, boxes_cxcywh, whole)
    for _ in range(20):
        asked, wrong = grounding.other_boxes(regions)
        assert asked.tolist() == [0, 1, 2]
        assert wrong[:2].tolist() == [2, 2] and wrong[2] in (0, 1)


def test_matching_is_learned_from_the_own_box_and_another(monkeypatch):
    batch, model = tiny.batch(2, 3), tiny.model()
    plain = grounding.Task(grounding.GroundingConfig(), model)({"region": batch})
    monkeypatch.setattr(grounding, "other_boxes", lambda _: (torch.tensor([1, 4]), torch.tensor([2, 5])))
    found = grounding.Task(grounding.GroundingConfig(itm=0.5), model)({"region": batch})
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss)
    words, concepts = model.encode_text(batch.texts), model.encode_image(batch.images, batch.regions)
    own = model.match(model.fuse(words, concepts, 2 + torch.arange(6)))
    other = model.match(model.fuse(words, concepts, torch.tensor([2 + 2, 2 + 5]), torch.tensor([1, 4])))
    logits, right = torch.cat([own, other]), torch.tensor([1] * 6 + [0] * 2)
    torch.testing.assert_close(found["region/itm"], 0.5 * torch.nn.functional.cross_entropy(logits, right))


# Two images.


def test_the_order_of_two_images_matters_unless_they_are_one():
    batch, task = tiny.batch(3, whole=True), nlvr.Task(NlvrConfig(), two_look_model("truth_head"))
    about = torch.tensor([[0, 1], [1, 1], [2, 0]])
    found = task.predict(statements(batch, about))
    swapped = task.predict(statements(batch, about.flip(1)))
    assert (swapped[[0, 2]] != found[[0, 2]]).all()
    torch.testing.assert_close(swapped[1], found[1])


def test_the_number_of_images_must_fit():
    batch, task = tiny.batch(3, whole=True), nlvr.Task(NlvrConfig(), two_look_model("truth_head"))
    concepts, words = task.model.encode_image(batch.images), task.model.encode_text(batch.texts)
    with pytest.raises(ValueError, match=r"about 1 concepts each, but text\.looks is 2"):
        task.model.fuse(words, concepts, torch.arange(3))


def test_every_parameter_of_the_two_image_model_learns():
    batch, task = tiny.batch(3, whole=True), nlvr.Task(NlvrConfig(), two_look_model("truth_head"))
    about = torch.tensor([[0, 1], [1, 2], [2, 0]])
    task({"nlvr": statements(batch, about)})["nlvr/truth"].backward()
    assert not [name for name, p in task.named_parameters() if p.grad is None]


def test_assigned_images_are_others_and_two_different_ones():
    image = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    own = torch.arange(5).repeat_interleave(200)
    others = nlvr.draw_others(image, own, 0.07)
    assert (others != own[:, None]).all() and (others[:, 0] != others[:, 1]).all()
    likeliest = (image @ image.T - 2 * torch.eye(5)).argmax(1)
    for i in range(5):
        assert others[own == i, 0].mode().values == likeliest[i]
    with pytest.raises(ValueError, match="two wrong images, but the batch has 2 images"):
        nlvr.draw_others(image[:2], own[:2], 0.07)


def test_the_answer_says_where_the_own_image_is():
    own, others = torch.arange(600) % 5, torch.tensor([[7, 8]]).repeat(600, 1)
    about, answer = nlvr.arrange(own, others, torch.rand(600, 2), 1 / 3)
    assert torch.equal(about[answer == 0], torch.stack([own, others[:, 0]], 1)[answer == 0])
    assert torch.equal(about[answer == 1], torch.stack([others[:, 0], own], 1)[answer == 1])
    assert torch.equal(about[answer == 2], others[answer == 2])
    assert (answer.bincount(minlength=3) / 600 - 1 / 3).abs().max() < 0.1


def test_assignment_trains_all_but_the_projection():
    task = Assignment(NlvrConfig(), two_look_model("image_projection", "assignment_head"))
    task({"caption": tiny.batch(4, 2)})["caption/assignment"].backward()
    without = {name for name, p in task.named_parameters() if p.grad is None}
    assert without == {"model.image_projection.weight", "model.image_projection.bias"}
    assert not any(p.requires_grad for p in task.model.image_projection.parameters())
