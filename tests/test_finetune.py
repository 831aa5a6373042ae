"""What each fine-tuning task learns from and is asked: streams, rows, numbers; one run from training to scoring."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xvlm import evaluate, hub
from xvlm.config import ConfigError, load_config
from xvlm.data import scenes
from xvlm.data.pack import CorpusConfig, pack
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.records import Question, Statement
from xvlm.data.shards import BrokenSample, Shards
from xvlm.data.stream_config import StreamConfig
from xvlm.data.writing import write_shards
from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.xvlm import XVLM
from xvlm.presence import Presence
from xvlm.tasks import captioning, nlvr, vqa
from xvlm.tasks.retrieval import RetrievalConfig, Task
from xvlm.zeroshot.gradcam import BestLayer

ROOT = Path(__file__).parents[1]
STILL = {"crop": "none", "hflip": 0.0, "randaugment": "none"}
MIRRORED = {"crop": "none", "hflip": 1.0, "flip_words": "swap", "randaugment": "none"}
PLACE = {"seed": 0, "rank": 0, "world": 1, "turns": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight scenes; the first is asked where something is, the second has neither questions nor statements."""
    folder = tmp_path_factory.mktemp("shards") / "test"
    samples = list(scenes.samples(scenes.SceneConfig(size=32), "test", 8))
    where = Question(text="Where is the left star?", answers={"top left": 0.7, "left": 0.3}, kind="where", id="17")
    samples[0] = samples[0][0].model_copy(update={"questions": [where]}), samples[0][1]
    samples[1] = samples[1][0].model_copy(update={"questions": [], "statements": []}), samples[1][1]
    write_shards(samples, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def processor():
    return Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32))


@pytest.fixture(scope="module")
def pretrained():
    return XVLM.from_pretrained("xvlm-scenes-tiny")


def stream_of(folder, grain, augment=STILL, **more):
    return StreamConfig(shards=[folder], grain=grain, images=4, max_regions=2, augment=augment, workers=0, **more)


def said(processor, ids) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


# VQA.


def test_answers_belong_to_their_questions(folder, processor):
    batch = next(vqa.Questions(stream_of(folder, "question"), processor, None, **PLACE).batches(0))
    known = {q.text: q.answers for i in range(8) for q in Shards(folder).read(i)[0].questions}
    cleaned = {said(processor, processor.encode(text)[0]): answers for text, answers in known.items()}
    assert batch.regions.whole.all() and len(batch.weights) == len(batch.answers.ids) > 0
    for answer, question, weight in zip(batch.answers.ids, batch.question, batch.weights, strict=True):
        asked = said(processor, batch.texts.ids[question])
        assert cleaned[asked][said(processor, answer)] == pytest.approx(weight.item())
    last = batch.answers.mask.sum(1) - 1
    ends = batch.answers.ids.gather(1, last[:, None])
    assert (ends == processor.tokenizer.sep_token_id).all()


def test_a_mirrored_image_has_mirrored_questions_and_answers(folder, processor):
    sample = vqa.Questions(stream_of(folder, "question", MIRRORED), processor, None, **PLACE).sample(
        0, "", Shards(folder), 0, Random(0)
    )
    assert said(processor, sample.said[0].ids) == "where is the right star"
    assert [(said(processor, ids), weight) for ids, weight in sample.said[0].answers] == [
        ("top right", 0.7),
        ("right", 0.3),
    ]


def test_a_record_without_questions_is_named(folder, processor):
    questions = vqa.Questions(stream_of(folder, "question"), processor, None, **PLACE)
    with pytest.raises(BrokenSample, match="no question with an answer"):
        questions.sample(1, "", Shards(folder), 1, Random(0))


def test_the_answer_list(folder, tmp_path):
    found = vqa.answer_list(vqa.VqaConfig(), [folder])
    weight = dict.fromkeys(found, 0.0)
    for i in range(8):
        for question in Shards(folder).read(i)[0].questions:
            for answer, share in question.answers.items():
                weight[answer] += share
    assert found == sorted(weight, key=lambda answer: (-weight[answer], answer))
    assert vqa.answer_list(vqa.VqaConfig(commonest=2), [folder]) == found[:2]
    file = tmp_path / "answers.json"
    file.write_text('["yes", "no"]')
    assert vqa.answer_list(vqa.VqaConfig(answers=file), []) == ["yes", "no"]
    file.write_text('{"yes": 1}')
    with pytest.raises(ValueError, match=r"answers.json: expected a JSON array"):
        vqa.answer_list(vqa.VqaConfig(answers=file), [])


def test_numbers_of_answers():
    def row(answer, kind, given):
        return vqa.Answered("r", "q", "3", kind, given, answer)

    rows = [
        row("red", "colour", {"red": 0.3, "blue": 0.7}),
        row("2", "count", {"two": 0.9, "3": 0.1}),
        row("x", "", {}),
    ]
    assert vqa.numbers(rows) == {
        "accuracy": pytest.approx((0.9 + 1) / 2),
        "accuracy colour": pytest.approx(0.9),
        "accuracy count": pytest.approx(1.0),
    }
    assert [each.answer for each in vqa.commonest(rows)] == ["blue", "two", ""]
    assert vqa.numbers(rows[2:]) == {}
    assert vqa.submission(rows[:1]) == [{"question_id": 3, "answer": "red"}]
    with pytest.raises(ValueError, match="record r: the question 'q' has no id"):
        vqa.submission([replace(rows[0], id="")])


def test_what_starts_fresh_in_an_answerer(pretrained):
    same = pretrained.vision.dim == pretrained.config.text.dim
    model, fresh = vqa.starting_model(vqa.VqaConfig(decoder_layers=2), pretrained)
    assert isinstance(model, Answerer) and not same
    assert fresh and all(".cross_attention.key." in name or ".cross_attention.value." in name for name in fresh)
    assert all(name.startswith("decoder.cross.layers.") for name in fresh)


# Captioning.


def test_captions_follow_the_prompt(folder):
    processor = Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32, end_token=True))
    start = captioning.start_of(processor, "there is")
    task = captioning.CaptioningConfig(prompt="there is", prompt_tokens=len(start))
    config = stream_of(folder, "caption", captions="first")
    batch = next(captioning.Captions(task, config, processor, **PLACE).batches(0))
    known = {Shards(folder).key(i): Shards(folder).read(i)[0].captions[0] for i in range(8)}
    for ids, name in zip(batch.texts.ids, batch.ids, strict=True):
        assert said(processor, ids) == said(processor, processor.encode(f"there is {known[name]}")[0])
    assert (batch.texts.ids[:, : len(start)] == torch.tensor(start)).all()
    with pytest.raises(ValueError, match=r"task.prompt_tokens is 4, but \[CLS\] 'there is' has 3 tokens"):
        captioning.Captions(captioning.CaptioningConfig(prompt="there is"), config, processor, **PLACE)


def test_a_caption_is_what_is_written_after_the_prompt(folder, pretrained):
    processor = Processor.from_pretrained("xvlm-scenes-tiny")
    config = {"prompt": "there is", "prompt_tokens": 3, "generation": {"beams": 2, "max_tokens": 9, "min_tokens": 6}}
    task = captioning.Task(captioning.CaptioningConfig.model_validate(config), Captioner.of(pretrained)).eval()

    def predict(_places, records, images):
        return captioning.ask(task, processor, records, images)

    rows = evaluate.each_once(predict, processor, Shards(folder), range(8), batch_size=3)
    assert [row.record for row in rows] == [Shards(folder).key(i) for i in range(8)]
    assert [list(row.references) for row in rows] == [Shards(folder).read(i)[0].captions for i in range(8)]
    assert all(not row.caption.startswith("there is") and 1 <= len(row.caption.split()) <= 6 for row in rows)


def test_numbers_of_captions():
    rows = [
        captioning.Captioned("a", ("A red disc is left of it.",), "a red disc is left of it"),
        captioning.Captioned("b", ("one big blue star there", "x"), "nothing"),
        captioning.Captioned("c", (), "not scored"),
    ]
    numbers = captioning.numbers(rows)
    assert numbers["CIDEr"] == pytest.approx(10 / 2) and numbers["ROUGE-L"] == pytest.approx(1 / 2)
    assert [row.caption for row in captioning.of_others(rows)] == [
        "one big blue star there",
        "A red disc is left of it.",
    ]


# NLVR2.


def test_statements_come_with_both_their_images(folder, processor):
    shards = Shards(folder)
    batch = next(nlvr.Pairs(stream_of(folder, "statement"), processor, None, **PLACE).batches(0))
    pixels = {shards.key(i): image for i in range(8) for _, image in evaluate_records(shards, processor, i)}
    known = {
        (record.id, said(processor, processor.encode(each.text)[0])): each
        for record in (shards.read(i)[0] for i in range(8))
        for each in record.statements
    }
    assert len(batch.about) > 1
    for ids, (left, right), true in zip(batch.texts.ids, batch.about.tolist(), batch.true, strict=True):
        statement = known[batch.ids[left], said(processor, ids)]
        assert statement.label == true
        torch.testing.assert_close(batch.images[left], pixels[batch.ids[left]])
        torch.testing.assert_close(batch.images[right], pixels[statement.other])


def evaluate_records(shards, processor, i):
    from xvlm.data.reading import records

    return [(some[0], images[0]) for some, images in records(shards, processor, [i], 1)]


def test_every_statement_is_judged_once(folder, pretrained):
    processor, shards = Processor.from_pretrained("xvlm-scenes-tiny"), Shards(folder)
    text = pretrained.config.text.model_copy(update={"looks": 2})
    model = XVLM(pretrained.config.model_copy(update={"text": text, "heads": nlvr.HEADS})).eval()
    task = nlvr.Task(nlvr.NlvrConfig(), model)

    def predict(places, records, images):
        return nlvr.ask(task, processor, shards, places, records, images)

    rows = evaluate.each_once(predict, processor, shards, range(8), batch_size=3)
    wanted = [(r.id, s.other, s.text, s.label) for r in (shards.read(i)[0] for i in range(8)) for s in r.statements]
    assert [(row.record, row.other, row.text, row.label) for row in rows] == wanted
    alone = evaluate.each_once(predict, processor, shards, range(8), batch_size=1)
    assert [row.probability for row in alone] == pytest.approx([row.probability for row in rows], abs=1e-5)


def test_another_image_that_is_not_there_is_named(folder):
    record = Shards(folder).read(0)[0].model_copy(update={"statements": [Statement(text="x", other="y", label=True)]})
    with pytest.raises(BrokenSample, match="the other image of a statement, 'y', is not in"):
        nlvr.number_of(Shards(folder), 0, record, "y")


def test_consistency_asks_for_every_pair_of_a_text():
    def row(text, label, probability):
        return nlvr.Judged("a", "b", text, label, probability)

    rows = [row("s", True, 0.9), row("s", False, 0.8), row("t", True, 0.6), row("t", False, 0.1)]
    assert nlvr.numbers(rows) == {"accuracy": 3 / 4, "consistency": 1 / 2}
    assert nlvr.numbers(nlvr.commonest([*rows, row("u", False, 0.9)]))["accuracy"] == 3 / 5


# Evaluation.


def worker(rank: int, world: int, folder: str, meet: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=rank, world_size=world)
    processor = Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32))

    def predict(places, records, images):
        return [[(place, record.id, rank)] * (place % 2) for place, record in zip(places, records, strict=True)]

    rows = evaluate.each_once(predict, processor, Shards(folder), [7, 1, 3, 0, 5], batch_size=2)
    Path(f"{meet}/{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def test_processes_share_the_records_and_all_have_the_rows_in_order(folder, tmp_path):
    mp.spawn(worker, args=(2, str(folder), str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [(place, name) for place, name, _ in first] == [(i, Shards(folder).key(i)) for i in (7, 1, 3, 5)]
    assert {rank for *_, rank in first} == {0, 1}


@pytest.fixture(scope="module")
def scripts():
    """finetune/train.py and finetune/evaluate.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "finetune"))
        loaded = []
        for name in ("train", "evaluate"):
            spec = importlib.util.spec_from_file_location(f"finetune_{name}", ROOT / f"finetune/{name}.py")
            loaded.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(loaded[-1])
        yield loaded


def test_a_run_is_trained_evaluated_and_scored_again(scripts, folder, tmp_path, capsys):
    train, score = scripts
    out = tmp_path / "run"
    words = [str(ROOT / "configs/finetune/vqa_scenes.yaml"), f"out={out}", "corpus=null", f"stream.shards=[{folder}]"]
    words += [f"evaluation.splits.test={folder}", "stream.images=4", "train.steps=2", "train.save_every=1"]
    with pytest.raises(ConfigError, match="no weights there; train first"):
        score.main(words)
    train.main(words)
    trained = json.loads((out / "results-test.json").read_text())
    rows = (out / "predictions-test.jsonl").read_text()
    score.main(words)
    again = json.loads((out / "results-test.json").read_text())
    assert again["numbers"] == trained["numbers"] and (out / "predictions-test.jsonl").read_text() == rows
    assert again["weights"] == trained["weights"] and again["data"] == trained["data"]
    kept = tmp_path / "kept.jsonl"
    kept.write_text(rows)
    capsys.readouterr()
    score.main([*words, f"predictions={kept}", f"out={tmp_path / 'nowhere'}"])
    assert f"{trained['numbers']['accuracy']:.3f}" in capsys.readouterr().out
    scored = json.loads((tmp_path / "kept.results.json").read_text())
    assert (scored["numbers"], scored["data"]) == (trained["numbers"], trained["data"])
    assert scored["predictions"] == {"folder": str(kept), "sha256": hub.digest(kept)}
    with pytest.raises(ValueError, match="has no id to be submitted under"):
        score.main([*words, f"predictions={kept}", f"submission={tmp_path / 'file.json'}"])
    kept.write_text(rows + '{"record": 3}\n')
    with pytest.raises(ValueError, match=rf"kept.jsonl line {len(rows.splitlines()) + 1}: "):
        score.main([*words, f"predictions={kept}"])
    with pytest.raises(ConfigError, match=r"evaluation\.splits has no 'val'; it has test"):
        score.main([*words, "split=val"])
    page = (out / "report.html").read_text()
    assert {"all", "words: attribute"} <= trained["slices"]["accuracy"].keys() and trained["slices"] == again["slices"]
    assert again["untrained"] == trained["untrained"] and again["minutes"] == trained["minutes"]
    assert "test: the best" in page and "words: attribute" in page and page.count("data:image/jpeg") > 12
    other = tmp_path / "elsewhere/other"
    shutil.copytree(out / "model", other)
    score.main([*words, f"model={other}"])  # is told of in a folder of its own
    assert (out / "elsewhere-other/report.html").exists()
    assert json.loads((out / "elsewhere-other/results-test.json").read_text())["numbers"] == trained["numbers"]
    assert json.loads((out / "results-test.json").read_text()) == again
    (out / "report.html").unlink()
    pages = sys.modules["pages"]
    capsys.readouterr()
    pages.main([str(out / "elsewhere-other")])
    pages.main([str(out)])
    assert (out / "report.html").read_text() == page
    capsys.readouterr()
    pages.main([str(out), str(out), f"out={tmp_path / 'both'}"])
    printed = capsys.readouterr().out
    assert f"{trained['numbers']['accuracy']:.3f}" in printed and (tmp_path / "both/report.html").exists()
    pages.main([str(out), str(out / "elsewhere-other")])
    assert (tmp_path / "comparison/report.html").exists()  # beside the first run
    with pytest.raises(FileNotFoundError, match=r"no results-\*\.json"):
        pages.main([str(tmp_path)])


def short(name: str, folder: Path, out: Path, *more: str) -> list[str]:
    """The words for two steps of a configuration on a folder of scenes."""
    words = [str(ROOT / f"configs/finetune/{name}_scenes.yaml"), f"out={out}", "corpus=null"]
    words += [f"stream.shards=[{folder}]", "stream.images=4", "train.steps=2", "train.save_every=1"]
    return [*words, f"evaluation.splits.test={folder}", "evaluation.untrained=false", *more]


def test_grounding_without_boxes_says_what_it_chose_among(scripts, folder, tmp_path):
    train, score = scripts
    out = tmp_path / "run"
    words = short("grounding_weak", folder, out)
    train.main(words)
    trained = json.loads((out / "results-test.json").read_text())
    asked = [said for i in range(8) for said in Shards(folder).read(i)[0].expressions if said.box_xyxy]
    assert trained["examples"] == len(asked) and (trained["proposals"], trained["layer"]) == ("objects", 1)
    assert trained["numbers"]["acc@0.5 of the best proposal"] == 1 and "energy_in_box" in trained["numbers"]
    assert 0 < trained["chance"]["acc@0.5"] < 1

    BestLayer(layer=0).save_pretrained(out / "model")
    dets = tmp_path / "dets.json"
    dets.write_text(json.dumps({Shards(folder).key(i): [[0, 0, 9, 9], [9, 9, 9, 9]] for i in range(8)}))
    score.main([*words, f"evaluation.proposals={dets}"])
    found = json.loads((out / "results-test.json").read_text())
    assert (found["proposals"], found["layer"]) == (str(dets), 0)
    assert found["proposals_sha256"] == hub.digest(dets)
    rows = [json.loads(line) for line in (out / "predictions-test.jsonl").read_text().splitlines()]
    assert all(row["proposals_xyxy"] == [[0, 0, 9, 9], [9, 9, 18, 18]] for row in rows)
    score.main([*words, "evaluation.proposals=none"])
    found = json.loads((out / "results-test.json").read_text())
    assert found["proposals"] == "none" and "acc@0.5 of the best proposal" not in found["numbers"]


def test_grounding_says_what_is_not_there(scripts, folder, tmp_path):
    train, score = scripts
    out = tmp_path / "run"
    words = short("grounding_presence", folder, out, f"evaluation.splits.val={folder}")
    train.main(words)
    known = Presence.from_pretrained(out / "model")
    trained = json.loads((out / "results-test.json").read_text())
    assert trained["presence"] == known.model_dump(exclude={"weights"})
    assert {"acc@0.5", "n_acc", "t_acc", "calibration_error", "f1_precision"} <= trained["numbers"].keys()
    expressions = [said for i in range(8) for said in Shards(folder).read(i)[0].expressions]
    assert trained["examples"] == len(expressions)
    assert trained["numbers"]["absent"] == pytest.approx(
        sum(said.box_xyxy is None for said in expressions) / len(expressions)
    )
    (out / "model/presence.json").unlink()
    score.main(words)
    without = json.loads((out / "results-test.json").read_text())
    assert without["presence"] is None and (without["numbers"]["n_acc"], without["numbers"]["t_acc"]) == (0, 1)
    assert without["numbers"]["acc@0.5"] == trained["numbers"]["acc@0.5"]


def test_what_cannot_be_calibrated_is_refused_before_training(scripts):
    words = [str(ROOT / "configs/finetune/grounding_scenes.yaml"), "--show"]
    with pytest.raises(ConfigError, match=r"evaluation: calibrate is 'val'; splits has test"):
        scripts[0].main([*words, "evaluation.calibrate=val"])
    with pytest.raises(
        ConfigError, match=r"evaluation\.calibrate is for grounding with a matching head: task\.itm above 0"
    ):
        scripts[0].main([*words, "evaluation.calibrate=test"])


@pytest.fixture
def rows(folder):
    """Some answers of each task about the eight scenes, right and wrong."""
    records = [Shards(folder).read(i)[0] for i in range(8)]
    where, pictures = (0.0, 0.0, 16.0, 16.0), [record.id for record in records]
    said = [(i, each) for i, record in enumerate(records) for each in record.expressions if each.box_xyxy]
    phrases = [
        evaluate.Query(i, e.text, (e.box_xyxy,), tuple(e.tags), where if n % 2 else e.box_xyxy, None, pictures[i])
        for n, (i, e) in enumerate(said)
    ]
    asked = [(record.id, q) for record in records for q in record.questions]
    answers = [vqa.Answered(name, q.text, q.id, q.kind, q.answers, "no") for name, q in asked]
    captions = [captioning.Captioned(r.id, tuple(r.captions), r.captions[n % 2]) for n, r in enumerate(records)]
    stated = [(record.id, each) for record in records for each in record.statements]
    truths = [nlvr.Judged(name, s.other, s.text, s.label, 0.3 + 0.1 * (n % 5)) for n, (name, s) in enumerate(stated)]
    ranks = [evaluate.Ranked("image_to_text", pictures[i], (i,), (0, 1), (2.0, 1.0), 1.0) for i in range(8)]
    for i, record in enumerate(records):  # every second one is found at once, the others late or not at all
        candidates = (i, (i + 1) % 8) if i % 2 else (4, 2)
        ranks.append(evaluate.Ranked("text_to_image", record.captions[0], (i,), candidates, (2.0, 1.5), 1.0))
    return {"grounding": phrases, "vqa": answers, "captioning": captions, "nlvr": truths, "retrieval": ranks}


@pytest.mark.parametrize("task", ["grounding", "vqa", "captioning", "nlvr", "retrieval"])
def test_written_rows_give_the_same_numbers_and_the_slices_add_up(task, scripts, rows, folder, tmp_path):
    runs, views = sys.modules["runs"], sys.modules["views"]
    overrides = [f"out={tmp_path}", f"evaluation.splits.test={folder}"]
    config = load_config(runs.FinetuneRun, ROOT / f"configs/finetune/{task}_scenes.yaml", overrides)
    result = runs.judge(config, "test", rows[task])
    runs.write_rows(tmp_path / "rows.jsonl", rows[task])
    again = runs.read_rows(config, tmp_path / "rows.jsonl")
    assert again == rows[task] and runs.judge(config, "test", again) == result
    assert {"split", "protocol", "settings", "data", "commit"} <= result.keys()
    assert result["data"]["sha256"] == hub.digest(folder)
    assert [len(table.columns) for table in runs.tables(result)] == [3] * (1 + len(config.recipe.views))
    assert result["slices"].keys() == {view.headline for view in config.recipe.views}
    for view in config.recipe.views:
        slices = result["slices"][view.headline]
        assert slices["all"][view.headline] == pytest.approx(result["numbers"][view.headline])
        assert len([name for name in slices if name.startswith("words: ")]) > 1
        assert all(1 <= part["examples"] <= slices["all"]["examples"] for part in slices.values())
        drawn = views.galleries(view, again, Shards(folder), "test", count=2)
        assert [gallery.title for gallery in drawn] == ["test: the best", "test: the worst", "test: drawn by lot"]
        assert all(len(gallery.pictures) == 2 for gallery in drawn)
        found = view.examples(again)
        captions = {view.draw(each.row, again, Shards(folder))[1]: each.score for each in found}
        scores = sorted(each.score for each in found)
        assert captions[drawn[0].pictures[0][1]] == scores[-1] > scores[0] == captions[drawn[1].pictures[0][1]]


def test_a_page_explains_the_numbers_and_slices_that_are_on_it(scripts, rows, folder, tmp_path):
    runs = sys.modules["runs"]

    def notes(task, rows):
        overrides = [f"out={tmp_path}", f"evaluation.splits.test={folder}"]
        config = load_config(runs.FinetuneRun, ROOT / f"configs/finetune/{task}_scenes.yaml", overrides)
        return [table.note for table in runs.tables(runs.judge(config, "test", rows))]

    numbers, slices = notes("grounding", rows["grounding"])
    assert "overall_iou" in numbers and "n_acc" not in numbers and "calibration_error" not in numbers
    assert "object: " in slices and "tag: " in slices and "kind: " not in slices
    absent = replace(rows["grounding"][0], boxes_xyxy=())
    assert "n_acc is" in notes("grounding", [*rows["grounding"], absent])[0]
    numbers, slices = notes("vqa", rows["vqa"])
    assert "accuracy KIND" in numbers and "kind: " in slices and "object: " not in slices
    assert "accuracy KIND" not in notes("vqa", [replace(row, kind="") for row in rows["vqa"]])[0]


def test_tags_kinds_and_sizes_are_slices(scripts, rows):
    views = sys.modules["views"]
    phrases = views.by_slice(views.GROUNDING, rows["grounding"])
    for tag in ("relation", "seen", "unseen"):
        tagged = [row for row in rows["grounding"] if tag in row.tags]
        share = sum(row.iou >= 0.5 for row in tagged) / len(tagged)
        assert phrases[f"tag: {tag}"] == {"examples": len(tagged), "acc@0.5": pytest.approx(share)}
    sizes = [part["examples"] for name, part in phrases.items() if name.startswith("object: ")]
    assert sum(sizes) == len(rows["grounding"])
    kinds = views.by_slice(views.VQA, rows["vqa"])
    assert kinds["kind: where"]["examples"] == sum(row.kind == "where" for row in rows["vqa"])
    assert views.by_slice(views.VQA, [replace(row, given={}) for row in rows["vqa"]]) == {}


def test_a_stream_of_another_task_is_refused(scripts):
    with pytest.raises(ConfigError, match=r"stream\.grain is 'caption'; grounding learns from 'region'"):
        scripts[0].main([str(ROOT / "configs/finetune/grounding_scenes.yaml"), "stream.grain=caption", "--show"])


# Own files, from the file to the numbers.


def own_files(folder: Path, ending: str, count: int = 11) -> Path:
    """Scenes as people have pictures: a file of annotations, and the pictures beside it."""
    (folder / "pictures").mkdir(parents=True)
    rows, images, annotations, lines = ["image,left,top,right,bottom,text"], [], [], []
    for i, (record, image) in enumerate(scenes.samples(scenes.SceneConfig(size=32), "train", count)):
        name, thing, caption = f"pictures/{i}.png", record.objects[0], record.captions[0]
        (folder / name).write_bytes(image)
        left, top, right, bottom = thing.box_xyxy
        rows += [f'{name},{left},{top},{right},{bottom},"{thing.label}"', f'{name},,,,,"{caption}"']
        images.append({"id": i, "file_name": name})
        box = [left, top, right - left, bottom - top]
        annotations += [{"image_id": i, "bbox": box, "caption": thing.label}, {"image_id": i, "caption": caption}]
        region = {"box_xyxy": thing.box_xyxy, "descriptions": [thing.label]}
        lines.append(json.dumps({"image": name, "captions": [caption], "regions": [region]}))
    coco = json.dumps({"images": images, "annotations": annotations})
    written = {".csv": "\n".join(rows), ".json": coco, ".jsonl": "\n".join(lines)}
    file = folder / f"my{ending}"
    file.write_text(written[ending])
    return file


OWN = ["train.steps=2", "train.save_every=2", "stream.images=4", "stream.workers=0", "evaluation.untrained=false"]


@pytest.mark.parametrize(
    ("task", "ending"),
    [
        ("grounding", ".csv"),
        ("grounding", ".json"),
        ("grounding", ".jsonl"),
        ("retrieval", ".csv"),
        ("captioning", ".csv"),
    ],
)
def test_one_file_of_ones_own_is_trained_on_with_every_tenth_image_held_out(scripts, tmp_path, task, ending):
    out, file = tmp_path / "run", own_files(tmp_path / "mine", ending)
    scripts[0].main([str(ROOT / f"configs/finetune/{task}.yaml"), f"data.train={file}", f"out={out}", *OWN])
    train, val = (Shards(out / "shards" / split) for split in ("train", "val"))
    assert [val.key(i) for i in range(len(val))] == ["pictures_0_png", "pictures_10_png"]
    assert [train.key(i) for i in range(len(train))] == [f"pictures_{i}_png" for i in range(1, 10)]
    result = json.loads((out / "results-val.json").read_text())
    assert result["examples"] in (2, 4) and result["numbers"]  # retrieval asks for images and for texts
    assert 0 < result["parameters that learn"] <= result["parameters"]


def test_validation_images_in_a_file_of_their_own(scripts, tmp_path):
    out, file, other = tmp_path / "run", own_files(tmp_path / "a", ".csv", 3), own_files(tmp_path / "b", ".csv", 2)
    words = [str(ROOT / "configs/finetune/grounding.yaml"), f"data.train={file}", f"data.val={other}", f"out={out}"]
    scripts[0].main([*words, *OWN])
    assert [len(Shards(out / "shards" / split)) for split in ("train", "val")] == [3, 2]
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"a/.*\.csv changed since .*train was packed.*choose another folder"):
        scripts[0].main([*words, *OWN, "title=again", f"out={tmp_path / 'other'}", f"corpus.out={out / 'shards'}"])


def mark_val(file: Path, *pictures: str) -> None:
    """Give a table a column that says of some pictures that they are for validation."""
    heading, *rows = file.read_text().splitlines()
    marked = [f"{row},{'val' if row.startswith(pictures) else 'train'}" for row in rows]
    file.write_text("\n".join([f"{heading},Split", *marked]))  # capitals are no matter


def test_the_rows_that_a_table_calls_val_are_held_out(scripts, tmp_path, capsys):
    out, file = tmp_path / "run", own_files(tmp_path / "mine", ".csv", 5)
    mark_val(file, "pictures/3.", "pictures/4.")
    scripts[0].main([str(ROOT / "configs/finetune/grounding.yaml"), f"data.train={file}", f"out={out}", *OWN])
    val = Shards(out / "shards/val")
    assert [val.key(i) for i in range(len(val))] == ["pictures_3_png", "pictures_4_png"]
    assert "images: train 3, val 2\n" in capsys.readouterr().out
    scripts[1].main([str(out / "config.yaml"), "split=val"])  # the run's own says it all
    assert "grounding, val: 2 examples" in capsys.readouterr().out


def test_shards_packed_before_from_one_table_of_all_splits_are_trained_on(scripts, tmp_path):
    file, shards, out = own_files(tmp_path / "mine", ".csv", 4), tmp_path / "shards", tmp_path / "run"
    mark_val(file, "pictures/0.")
    for split in ("train", "val"):
        pack(CorpusConfig(reader="csv_table", files={split: file}, out=shards, splits={split: None}))
    packed = {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    words = [f"data.train={file}", f"data.val={file}", f"corpus.out={shards}", f"out={out}"]
    scripts[0].main([str(ROOT / "configs/finetune/grounding.yaml"), *words, *OWN])
    assert packed == {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    assert [len(Shards(shards / split)) for split in ("train", "val")] == [3, 1]
    assert (out / "results-val.json").exists()


def test_a_run_does_not_go_on_with_other_data(scripts, tmp_path, capsys):
    out, file = tmp_path / "run", own_files(tmp_path / "mine", ".csv", 4)
    words = [str(ROOT / "configs/finetune/grounding.yaml"), f"data.train={file}", f"out={out}", *OWN]
    file.write_text(f"{file.read_text()}\npictures/0.png,0,0,5,5,twice\npictures/0.png,9,9,15,15,twice")
    table = file.read_text()
    scripts[0].main(words)
    result = json.loads((out / "results-val.json").read_text())
    assert (result["examples"], result["left_out"]) == (1, 2)
    left_out = "grounding, val: 1 example, 2 texts left out (several boxes of an image have the same one)"
    assert left_out in capsys.readouterr().out and left_out in (out / "report.html").read_text()
    scripts[0].main(words)  # is finished
    file.write_text(table.replace('3.png,,,,,"', '3.png,,,,,"now '))
    other = r"run was trained on another .*my\.csv; remove that run, or choose another out="
    for main, changed in ((scripts[0].main, words), (scripts[1].main, [*words, "split=val"])):
        with pytest.raises(ConfigError, match=other):
            main(changed)
    (out / "report.html").unlink()  # as in a run that was interrupted
    with pytest.raises(ConfigError, match=other):
        scripts[0].main(words)
    file.write_text(table)
    shutil.rmtree(out / "shards")
    scripts[0].main(words)  # the same is packed again, and the run ends
    shutil.rmtree(out / "shards")
    (tmp_path / "mine/pictures/3.png").write_bytes((tmp_path / "mine/pictures/2.png").read_bytes())
    (out / "report.html").unlink()
    with pytest.raises(ConfigError, match=r"run was trained on another .*shards/train; "):
        scripts[0].main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=absent.csv"], r"absent\.csv: no such file"),
        (["data.train=my.xlsx"], r"data: found my\.xlsx; expected files that all end in one of \.csv, \.json, \.jsonl"),
        (
            ["data.train=a.csv", "data.val=b.json"],
            r"data: found a\.csv, b\.json; expected files that all end in one of",
        ),
        (["data=", "data.val=b.csv"], r"which file to train on\? data\.train=my\.csv"),
    ],
)
def test_files_that_cannot_be_trained_on(scripts, tmp_path, words, message):
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        scripts[0].main([str(ROOT / "configs/finetune/grounding.yaml"), *words, f"out={tmp_path / 'run'}"])


def test_a_wrong_row_is_named_by_file_line_and_columns(scripts, tmp_path):
    file = own_files(tmp_path / "mine", ".csv", 2)
    file.write_text(file.read_text() + "\npictures/1.png,3,wide,9,9,text\n")
    with pytest.raises(ValueError, match=r"my\.csv line 6: left,top,right,bottom: expected four numbers, found 3,wide"):
        scripts[0].main(
            [str(ROOT / "configs/finetune/grounding.yaml"), f"data.train={file}", f"out={tmp_path / 'run'}"]
        )


# What is still known.


@pytest.mark.parametrize("config", ["grounding_scenes_lora", "captioning_scenes"])
def test_the_old_task_is_asked_before_and_after(scripts, folder, tmp_path, config):
    out = tmp_path / "run"
    words = [str(ROOT / f"configs/finetune/{config}.yaml"), f"out={out}", "corpus=null", f"stream.shards=[{folder}]"]
    words += [f"evaluation.splits.test={folder}", *OWN, "retention.task={name: retrieval, captions: 1, top_k: 4}"]
    words += [f"retention.shards={folder}", "retention.records=8", "optim.warmup=0", "optim.lr=1"]
    scripts[0].main(words)
    found = json.loads((out / "results-test.json").read_text())["retention"]
    known = Task(RetrievalConfig(captions=1, top_k=4), XVLM.from_pretrained("xvlm-scenes-tiny"))
    processor = Processor.from_pretrained("xvlm-scenes-tiny")
    asked = evaluate.retrieval(known.model, processor, Shards(folder), range(8), captions=1, top_k=4, batch_size=8)
    assert found["before"] == pytest.approx(evaluate.retrieval_numbers(asked.rows))
    assert found["after"].keys() == found["before"].keys() and found["after"] != found["before"]
    assert "retained: retrieval" in (out / "report.html").read_text()
    if config.endswith("lora"):  # the merged folder, with the old heads, gives the same
        model = XVLM.from_pretrained(out / "model")
        known.model.load_state_dict(known.model.state_dict() | model.state_dict())
        asked = evaluate.retrieval(known.model, processor, Shards(folder), range(8), captions=1, top_k=4, batch_size=8)
        assert found["after"] == pytest.approx(evaluate.retrieval_numbers(asked.rows))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["retention={task: {name: captioning}, shards: x}"],
            r"task captioning: pre-trained weights know retrieval and grounding",
        ),
        (["lora={}", "from_scratch=true"], "lora adapts pre-trained weights, and from_scratch has none"),
    ],
)
def test_adaptations_that_make_no_sense(scripts, words, message):
    with pytest.raises(ConfigError, match=message):
        scripts[0].main([str(ROOT / "configs/finetune/grounding_scenes.yaml"), *words, "--show"])


# One after the other.


def test_assignment_then_nlvr_and_captions_then_scores(scripts, folder, tmp_path):
    """What one run leaves, the next one starts from."""

    def run(config: str, *words: str) -> Path:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        common = ["corpus=null", f"stream.shards=[{folder}]", f"evaluation.splits.test={folder}", *OWN]
        scripts[0].main([str(ROOT / f"configs/finetune/{config}.yaml"), f"out={out}", *common, *words])
        return out / "model"

    prepared = run("nlvr_scenes_assignment")
    judged = run("nlvr_scenes", f"init.model={prepared}")
    assert XVLM.from_pretrained(judged).config.text.looks == XVLM.from_pretrained(prepared).config.text.looks == 2
    writes = run("captioning_scenes")
    scores = ["task.self_critical={samples: 2, max_tokens: 8}", "stream.captions=any", "stream.max_captions=2"]
    rewarded = run("captioning_scenes", f"init.model={writes}", *scores, "optim.warmup=0")
    first = dict(Captioner.from_pretrained(writes).named_parameters())
    second = Captioner.from_pretrained(rewarded).named_parameters()
    off = max(float((parameter - first[name]).detach().abs().max()) for name, parameter in second)
    assert 0 < off < 0.1  # two small steps away from where the first run ended
