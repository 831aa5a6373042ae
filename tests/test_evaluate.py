"""Evaluation protocols against brute force, on a few scenes and an untrained model."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xvlm import boxes, evaluate, metrics, probe
from xvlm.data import proposals, scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.reading import records
from xvlm.data.records import Region
from xvlm.data.shards import Shards
from xvlm.data.writing import write_shards
from xvlm.presence import Presence, WithPresence
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.zeroshot.gradcam import GradCAM, GradCAMConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its processor, and shards of eight scenes."""
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(scenes.samples(scenes.SceneConfig(size=32), "test", 8), folder, progress=False)
    return *small_world(), Shards(folder)


def small_world():
    words = scenes.vocabulary()
    text = tiny.TEXT.model_copy(update={"vocab_size": len(words), "max_positions": 40})
    model = tiny.model(tiny.CONFIG.model_copy(update={"text": text}))
    return model, Processor.from_vocabulary(words, ProcessorConfig(image_size=32))


def test_retrieval_scores_are_the_matching_logits(world):
    model, processor, shards = world
    found = evaluate.retrieval(model, processor, shards, range(8), captions=2, top_k=99, batch_size=3)
    assert found.indices == list(range(8)) and found.text_image.tolist() == [i for i in range(8) for _ in range(2)]
    (some, images), *_ = list(records(shards, processor, range(8), 8))
    assert found.texts == [caption for record in some for caption in record.captions[:2]]
    with torch.inference_mode():
        concepts = model.encode_image(images)
        for column, text in enumerate(found.texts):
            words = model.encode_text(processor.texts([text] * 8))
            expected = model.match(model.fuse(words, concepts, torch.arange(8)))[:, 1]
            torch.testing.assert_close(found.scores[:, column], expected, atol=1e-5, rtol=1e-5)


def test_texts_of_several_boxes_are_left_out_and_counted_and_the_same_box_again_is_one(tmp_path):
    record, image = next(scenes.samples(scenes.SceneConfig(size=32), "test", 1))
    said = [((0, 0, 9, 9), "a cup"), ((9, 9, 20, 20), "a cup"), ((0, 0, 9, 9), "red"), ((0, 0, 9, 9), "red")]
    regions = [Region(box_xyxy=box, descriptions=[text]) for box, text in said]
    bare = record.model_copy(update={"expressions": [], "regions": regions})
    write_shards([(bare, image)], tmp_path, progress=False)
    asked = [(query.text, query.boxes_xyxy) for query in evaluate.queries(bare, 0)]
    assert asked == [("red", ((0, 0, 9, 9),))]
    assert evaluate.left_out(Shards(tmp_path), [0]) == 2
    assert list(evaluate.queries(record, 0)) and evaluate.left_out(Shards(tmp_path), []) == 0


def test_each_direction_ranks_its_own_candidates(world):
    """By brute force: the first of an image's (a text's) most similar ones by matching score must be its own."""
    model, processor, shards = world
    found = evaluate.retrieval(model, processor, shards, range(8), captions=2, top_k=3)
    (_, images), *_ = list(records(shards, processor, range(8), 8))
    with torch.inference_mode():
        image = model.embed_image(model.encode_image(images))
        similarity = image @ model.embed_text(model.encode_text(processor.texts(found.texts))).T
    of, scores = found.text_image, found.scores
    right = [int(of[max(similarity[i].topk(3).indices.tolist(), key=lambda t: scores[i, t])]) == i for i in range(8)]
    assert found.numbers["image_to_text_r1"] == sum(right) / 8
    right = [max(similarity[:, t].topk(3).indices.tolist(), key=lambda i: scores[i, t]) == of[t] for t in range(16)]
    assert found.numbers["text_to_image_r1"] == sum(right) / 16


def test_only_candidates_are_scored(world):
    model, processor, shards = world
    found = evaluate.retrieval(model, processor, shards, range(8), top_k=2)
    scored = found.scores > -math.inf
    assert (scored.sum(0) >= 2).all() and (scored.sum(1) >= 2).all() and not scored.all()


def test_grounding_asks_every_expression_once_and_answers_in_pixels(world):
    model, processor, shards = world
    answered = evaluate.grounding(Task(PretrainingConfig(), model), processor, shards, range(8), batch_size=3)
    wanted = [e.text for i in range(8) for e in shards.read(i)[0].expressions if e.box_xyxy]
    assert [query.text for query in answered] == wanted
    (some, images), *_ = list(records(shards, processor, [answered[0].index], 1))
    with torch.inference_mode():
        words = model.encode_text(processor.texts([answered[0].text]))
        box = model.locate(model.fuse(words, model.encode_image(images), torch.tensor([0])))
    expected = boxes.cxcywh_to_xyxy(box).clamp(0, 1)[0] * some[0].width
    torch.testing.assert_close(torch.tensor(answered[0].predicted_xyxy), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_retrieval_give_its_numbers_again(world):
    model, processor, shards = world
    found = evaluate.retrieval(model, processor, shards, range(8), captions=2, top_k=3)
    numbers = evaluate.retrieval_numbers(found.rows)
    assert {name: pytest.approx(value) for name, value in found.numbers.items()}.items() <= numbers.items()
    kept = [numbers[f"{way}_r{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert numbers["r_mean"] == pytest.approx(sum(kept) / 6)


def test_chance_of_retrieval_is_what_random_scores_get():
    of = torch.arange(40) // 2
    expected = {"image_to_text_r1": 2 / 40, "text_to_image_r1": 1 / 20, "text_to_image_r10": 0.5}
    expected["image_to_text_r5"] = 1 - math.comb(38, 5) / math.comb(40, 5)
    rows = [evaluate.Ranked("image_to_text", "", (2 * i, 2 * i + 1), (), (), 1.0) for i in range(20)]
    rows += [evaluate.Ranked("text_to_image", "", (i // 2,), (), (), 1.0) for i in range(40)]
    chance = evaluate.retrieval_chance(rows)
    assert {name: chance[name] for name in expected} == {name: pytest.approx(value) for name, value in expected.items()}
    measured = [metrics.recall_at_k(torch.rand(20, 40), of) for _ in range(300)]
    for name, value in chance.items():
        assert sum(one[name] for one in measured) / 300 == pytest.approx(value, abs=0.03)


def query(predicted, true, *tags):
    return evaluate.Query(0, "a phrase", (true,), tags, predicted)


def test_referring_numbers_by_threshold_size_and_tag():
    """IoU 1 of a small object, 0.75 of a medium one, 0.5 of a large one; by area 100 + 3000 + 10000 of 14100."""
    answered = [
        query((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0), "seen", "large"),  # for a scene, not by COCO's areas
        query((0.0, 0.0, 40.0, 75.0), (0.0, 0.0, 40.0, 100.0), "seen", "left"),
        query((0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 200.0), "left"),
        query((0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0), "seen"),
    ]
    expected = {"acc@0.5": 3 / 4, "acc@0.7": 2 / 4, "acc@0.9": 1 / 4, "mean_iou": 2.25 / 4}
    expected["overall_iou"] = (100 + 3000 + 10000) / (100 + 4000 + 20000 + 200)
    expected |= {"acc@0.5 small": 1 / 2, "acc@0.5 medium": 1.0, "acc@0.5 large": 1.0}
    expected |= {"acc@0.5 tag: seen": 2 / 3, "acc@0.5 tag: left": 1.0, "acc@0.5 tag: large": 1.0}
    assert evaluate.referring_numbers(answered) == {name: pytest.approx(value) for name, value in expected.items()}
    with pytest.raises(ValueError, match="no record has a box whose text it says once"):
        evaluate.referring_numbers([])


def share(rank: int, world: int, folder: str, meet: str) -> None:
    """One of several processes asks a model for boxes and ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=rank, world_size=world)
    Path(f"{meet}/{rank}.json").write_text(json.dumps([[asdict(row) for row in rows] for rows in ask(Shards(folder))]))
    dist.destroy_process_group()


def ask(shards: Shards) -> list[list]:
    """Five records, which two processes cannot share evenly."""
    model, processor = small_world()
    boxes_found = evaluate.grounding(Task(PretrainingConfig(), model), processor, shards, range(5), batch_size=2)
    found = evaluate.retrieval(model, processor, shards, range(5), captions=2, top_k=3, batch_size=2)
    return [boxes_found, found.rows]


def test_two_processes_give_the_rows_of_one_each_once_in_the_same_order(world, tmp_path):
    shards = world[2]
    mp.spawn(share, args=(2, str(shards.folder), str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    boxes_found, ranked = ask(shards)
    said = [expression.text for i in range(5) for expression in shards.read(i)[0].expressions if expression.box_xyxy]
    assert [row["text"] for row in first[0]] == said == [row.text for row in boxes_found]
    for theirs, row in zip(first[0], boxes_found, strict=True):
        assert theirs["predicted_xyxy"] == pytest.approx(row.predicted_xyxy, abs=1e-4)
    assert [row["query"] for row in first[1]] == [row.query for row in ranked] and len(ranked) == 5 + 10
    for theirs, row in zip(first[1], ranked, strict=True):
        assert (tuple(theirs["right"]), tuple(theirs["candidates"])) == (row.right, row.candidates)
        assert theirs["scores"] == pytest.approx(row.scores, abs=1e-5)


def test_phrases_without_a_target_are_asked_where_wanted(world):
    model, processor, shards = world
    task = Task(PretrainingConfig(), model)
    sure = WithPresence(task, model, Presence(image=1.0, region=0.0, bias=0.0, threshold=0.5))
    answered = evaluate.grounding(sure, processor, shards, range(8), absent=True, threshold=0.5)
    expressions = [said for i in range(8) for said in shards.read(i)[0].expressions]
    assert [(query.text, bool(query.boxes_xyxy)) for query in answered] == [
        (said.text, said.box_xyxy is not None) for said in expressions
    ]
    assert all(query.threshold == 0.5 and query.said == (query.presence >= 0.5) for query in answered)
    there = [query for query in answered if query.boxes_xyxy]
    both, alone = evaluate.referring_numbers(answered), evaluate.referring_numbers(there)
    assert len(there) < len(answered) and alone.items() <= both.items() and "n_acc" not in alone
    assert both["n_acc"] == sum(not query.said for query in answered if not query.boxes_xyxy) / (
        len(answered) - len(there)
    )


def test_presence_numbers_by_hand():
    """Found; missed; denied; two things; of two that are not there one is denied."""
    box, far = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    rows = [([box], 0.9), ([far], 0.8), ([box], 0.1), ([box, far], 0.7), ([], 0.2), ([], 0.6)]
    answered = [evaluate.Query(0, "a phrase", tuple(true), (), box, presence, threshold=0.5) for true, presence in rows]
    numbers = evaluate.presence_numbers(answered)
    assert (numbers["n_acc"], numbers["t_acc"]) == (1 / 2, 3 / 4)
    assert numbers["f1_precision"] == pytest.approx(2 / 6) and numbers["several"] == pytest.approx(1 / 6)
    # Each in a bin of its own.
    assert numbers["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.9 + 0.3 + 0.2 + 0.6) / 6)
    always = evaluate.presence_numbers([evaluate.replace(query, threshold=None) for query in answered])
    assert (always["n_acc"], always["t_acc"], always["f1_precision"]) == (0.0, 1.0, pytest.approx(2 / 6))
    assert always["calibration_error"] == pytest.approx(2 / 6)  # as sure as can be, of a third wrongly


def test_heat_and_proposals_are_kept_with_the_answers(world):
    model, processor, shards = world
    propose = proposals.reader("objects")
    answered = evaluate.grounding(GradCAM(GradCAMConfig(), model), processor, shards, range(3), proposals=propose)
    for query in answered:
        boxes_xyxy = [tuple(box) for box in propose(shards.read(query.index)[0]).boxes_xyxy.tolist()]
        assert list(query.proposals_xyxy) == boxes_xyxy
        assert any(query.predicted_xyxy == pytest.approx(box, abs=1e-3) for box in boxes_xyxy)
        assert 0 <= query.pointed <= 1 and 0 <= query.energy <= 1
    numbers = evaluate.referring_numbers(answered)
    assert numbers["energy_in_box"] == pytest.approx(sum(query.energy for query in answered) / len(answered))
    assert all(query.iou == pytest.approx(1) for query in evaluate.best_proposals(answered))
    drawn = [evaluate.random_proposals(answered, seed) for seed in range(200)]
    assert all(query.predicted_xyxy in query.proposals_xyxy for query in drawn[0])
    share = sum(1 / len(query.proposals_xyxy) for query in answered) / len(answered)
    apart = [sum(q.iou == pytest.approx(1) for q in one) / len(answered) for one in drawn]
    assert sum(apart) / len(apart) == pytest.approx(share, abs=0.05)


def test_right_answers_score_one(world):
    model, processor, shards = world
    answered = evaluate.grounding(Task(PretrainingConfig(), model), processor, shards, range(8))
    right = [evaluate.replace(query, predicted_xyxy=query.boxes_xyxy[0]) for query in answered]
    numbers = evaluate.grounding_numbers(right)
    assert (numbers["any_box_acc"], numbers["merged_box_acc"], numbers["mean_iou"]) == (1.0, 1.0, pytest.approx(1.0))
    assert numbers["phrases"] == len(answered)


def test_region_matching_of_an_untrained_model_reports_chance(world):
    model, processor, shards = world
    numbers = evaluate.region_matching(model, processor, shards, range(8), batch_size=3)
    counts = [len(shards.read(i)[0].regions) for i in range(8)]
    assert min(counts) > 1 and numbers["chance"] == pytest.approx(len(counts) / sum(counts))
    assert 0 <= numbers["region_to_text"] <= 1


def test_probe_numbers_and_report(world, tmp_path):
    model, processor, shards = world
    where = probe.Slice(shards=shards.folder, tag="unseen")
    config = probe.ProbeConfig(slices={"unseen": where}, gallery=4, top_k=2)
    numbers, answered = probe.probe(Task(PretrainingConfig(), model), processor, config)
    assert {query.index % 2 for query in answered["unseen"]} == {1}  # every second test scene is an unseen one
    assert numbers["unseen"]["chance_text_to_image_r1"] == 0.25
    assert numbers["unseen"]["chance_image_to_text_r5"] == 1.0
    (tmp_path / "commits.txt").write_text("earlier\n")
    probe.note_commit(tmp_path)
    probe.note_commit(tmp_path)
    about = probe.facts(tmp_path, 7, 1.5)
    assert about["commit"] == f"earlier, {probe.commit()}"
    made = probe.write(tmp_path, "a title", numbers, numbers, answered, config, about)
    assert [row[0] for row in made[0].rows] == list(probe.MEASURES.values())
    text = (tmp_path / "results.json").read_text()
    assert '"seed": 7' in text and '"unseen/trained/any_box_acc"' in text and '"unseen/untrained/mean_iou"' in text
    assert "a title" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"no record in .* has the tag 'nonesuch'"):
        nowhere = {"slices": {"x": where.model_copy(update={"tag": "nonesuch"})}}
        probe.probe(Task(PretrainingConfig(), model), processor, config.model_copy(update=nowhere))
