"""The ``xvlm`` command: what it prints and writes, and one clear line where something is missing."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import official
import pytest
import tiny
import torch
from photographs import place
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from xvlm import hub, viz
from xvlm.__main__ import app, main
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.shards import Shards
from xvlm.models import golden
from xvlm.models.xvlm import XVLM


@pytest.fixture
def folder(tmp_path):
    """Weights of a tiny model that knows the words of scenes, and their processor."""
    processor = Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32, max_tokens=16))
    text = tiny.TEXT.model_copy(update={"vocab_size": processor.vocab_size})
    tiny.model(tiny.CONFIG.model_copy(update={"text": text})).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path):
    scene = scenes.sample_scene(scenes.SceneConfig(), "test", 0)
    Image.fromarray(scenes.draw(scene, 96)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def lines_of(*arguments) -> list[str]:
    """What a command prints; it must end well."""
    ran = CliRunner().invoke(app, [str(word) for word in arguments])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return ran.stdout.splitlines()


def error_of(monkeypatch, *arguments) -> str:
    """The one line with which the command ends; ``sys.exit`` with a text prints it and sets status 1."""
    monkeypatch.setattr(sys, "argv", ["xvlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    message = stopped.value.code
    assert isinstance(message, str), message
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_annotations_of_any_name_and_images_elsewhere(monkeypatch, tmp_path):
    place(tmp_path, "photos/a.jpg")
    file = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    exported = tmp_path / "instances_default.json"
    exported.write_text(json.dumps(file))
    where = ("--file", exported, "--images", tmp_path / "photos", "--workers", 0)
    checked = lines_of("data", "check", tmp_path, "--reader", "coco_json", *where)
    assert checked == [f"{tmp_path}: 1 record of split train, 0 problems; other splits were not looked at (--split)"]
    out = tmp_path / "shards"
    assert lines_of("data", "pack", "coco_json", out, "--split", "val", *where) == [f"{out / 'val'}: 1 record"]
    assert "files: coco reads a folder" in error_of(monkeypatch, "data", "pack", "coco", out, *where)


def test_help_lists_the_commands_without_importing_torch():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "xvlm", "--help"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    for command in ("demo", "report", "ground", "embed", "export", "convert", "verify", "push", "data"):
        assert f" {command} " in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "xvlm.hub" in imported
    assert imported.isdisjoint({"torch", "timm", "transformers", "accelerate"})


def test_data_is_checked_and_counted_without_importing_torch(tmp_path):
    shards, index = tmp_path / "shards/train", tmp_path / "index"
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--limit", 2, "--workers", 0)
    commands = [
        ["check", shards, "--workers", 0],
        ["stats", shards],
        ["schema"],
        ["index", shards / "000000.tar", "--out", index, "--cache", tmp_path / "cache"],
    ]
    script = "import sys\nfrom typer.testing import CliRunner\nfrom xvlm.__main__ import app\n" + "".join(
        f"assert CliRunner().invoke(app, {['data', *map(str, words)]}).exit_code == 0\n" for words in commands
    )
    script += "assert 'xvlm.data.shards' in sys.modules and 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_is_wrong_with_a_demo_is_one_line():
    command = [sys.executable, "-m", "xvlm", "demo", "nonsense=1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.fullmatch(r"error: .*demo\.yaml: unknown key 'nonsense'; .*\n", ran.stderr)


def test_scenes_are_packed_and_shown(tmp_path):
    printed = lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "test", "--limit", 6, "--workers", 1)
    assert printed[-1] == f"{tmp_path / 'shards/test'}: 6 records"
    assert len(Shards(tmp_path / "shards/test")) == 6
    sheet = tmp_path / "sheet.png"
    assert lines_of("data", "show", tmp_path / "shards/test", "--out", sheet, "--count", 4) == [str(sheet)]
    assert min(Image.open(sheet).size) > 128


def test_tars_are_indexed_and_then_shown_like_packed_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where what is fetched is kept by default
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--limit", 4)
    (tmp_path / "shards/train/index.json").unlink()
    tars, index = f"pipe:cat {tmp_path}/shards/train/{{000000..000000}}.tar", tmp_path / "index"
    printed = lines_of("data", "index", tars, "--out", index, "--cache", tmp_path / "cache")
    assert printed[-1] == f"{index}: 4 records in 1 tar"
    lines_of("data", "show", tmp_path / "index", "--out", tmp_path / "sheet.png", "--count", 4)
    assert (tmp_path / "sheet.png").stat().st_size
    assert "cannot be fetched" in error_of(monkeypatch, "data", "index", "pipe:false", "--out", tmp_path / "other")


def test_what_is_packed_is_checked_and_counted(tmp_path, monkeypatch):
    folder = tmp_path / "shards/test"
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "test", "--limit", 6, "--workers", 0)
    assert lines_of("data", "check", folder, "--workers", 0) == [f"{folder}: 6 records, 0 problems"]
    counted = lines_of("data", "stats", folder, "--plots", tmp_path / "plots.png")
    assert counted[0].startswith("scenes: 6 records; ")
    assert Image.open(tmp_path / "plots.png").format == "PNG"
    again = ("data", "pack", "scenes", tmp_path / "again", "--split", "test", "--workers", 0, "--avoid", folder)
    printed = lines_of(*again, "--limit", 7, "--leaks", "report")
    remarks = tmp_path / "again/test/remarks.jsonl"
    assert printed[-2:] == [f"leak: 6 packed all the same, listed in {remarks}", f"{tmp_path}/again/test: 7 records"]
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"id":', b'{"if":', 1))
    printed = CliRunner().invoke(app, ["data", "stats", str(folder)]).stdout.splitlines()
    assert printed[0].startswith("scenes: 5 records; ")
    assert printed[-1] == "1 record that cannot be read: not counted"
    tar.unlink()
    ran = CliRunner().invoke(app, ["data", "check", str(folder), "--workers", "0"])
    assert ran.exit_code == 1
    assert "000000.tar: no such file" in ran.stdout
    ran = ("data", "check", folder, "--workers", 0, "--ignore", "shard")
    assert "nothing to check" in error_of(monkeypatch, *ran)


def test_what_is_shown_can_be_chosen(tmp_path, monkeypatch):
    folder, sheet = tmp_path / "shards/test", tmp_path / "sheet.png"
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "test", "--limit", 6, "--workers", 0)
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"id":', b'{"if":', 1))
    shards = Shards(folder)
    record = shards.read(3)[0]
    sheets: list[list[str]] = []
    monkeypatch.setattr(viz, "contact_sheet", lambda images, captions: sheets.append(captions) or images[0])
    show = ["data", "show", str(folder), "--out", str(sheet)]

    def shown(*more) -> list[str]:
        lines_of(*show, *more)
        return sheets.pop()

    ran = CliRunner().invoke(app, [*show, "--count", "3", "--kind", "captions"])
    assert ran.stderr.startswith("left out: ")
    assert len(sheets.pop()) == 3  # those behind the broken one
    (legend,) = shown("--record", record.id, "--kind", "objects", "--most", 1)
    assert legend.endswith(f"objects:\n1 {record.objects[0].label}\nand {len(record.objects) - 1} more")
    label = record.objects[-1].label
    (legend,) = shown("--record", record.id, "--kind", "objects", "--text", label.upper())
    assert legend.count("\n") == 1 + sum(thing.label == label for thing in record.objects)
    for wrong, message in {
        ("--kind", "foo"): "--kind foo: no such kind of text; there are captions, ",
        ("--record", "foo"): "--record foo: there is no such record",
        ("--text", "no such words"): "no record that can be shown",
    }.items():
        assert message in error_of(monkeypatch, *show, *wrong)
    for none in (0, -1):
        assert CliRunner().invoke(app, [*show, "--count", str(none)]).exit_code == 2
    assert "no such kind" in error_of(monkeypatch, "data", "check", folder, "--ignore", "shards")


def test_a_source_is_checked_before_it_is_packed(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("CMYK", (40, 30)).save(tmp_path / "images/a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    captions = [{"id": 1, "image_id": 1, "caption": "..."}]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_train.json").write_text(json.dumps({"images": images, "annotations": captions}))
    ran = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--reader", "coco", "--workers", "0"])
    assert ran.exit_code == 1
    assert "1: captions.0: expected words" in ran.stdout
    assert "CMYK" in ran.stdout
    fix = str(tmp_path / "fixed")
    ran = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--reader", "coco", "--workers", "0", "--fix", fix])
    assert ran.exit_code == 0
    assert f"{tmp_path}: 1 record of split train, 0 problems left" in ran.stdout
    assert Shards(fix).read(0)[0].captions == []


def test_packing_that_is_stopped_says_how_it_continues(tmp_path, monkeypatch):
    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("xvlm.data.pack.pack", stopped)
    ran = CliRunner().invoke(app, ["data", "pack", "scenes", str(tmp_path), "--limit", "9"])
    assert (ran.exit_code, ran.stderr) == (130, "stopped; the same command continues\n")


def test_packing_photographs_that_exif_turns_says_what_to_do_about_their_boxes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "train.csv").write_text("image,left,top,right,bottom,text\na.jpg,1,2,20,20,a dog\n")
    out = tmp_path / "shards"
    told, what_to_do, _ = lines_of("data", "pack", "csv_table", out, "--folder", tmp_path, "--workers", 0)
    assert told.startswith("rotated: 1 packed all the same")
    assert f"xvlm data show {out}/train" in what_to_do
    assert f"xvlm data check {out}/train --boxes-turned --fix" in what_to_do


def test_ground_prints_a_line_for_each_phrase_and_draws(folder, picture, tmp_path):
    phrases, drawn = ["the small red disc", "a star"], tmp_path / "drawn.png"
    *found, written = lines_of("ground", picture, *phrases, "--model", folder, "--out", drawn)
    assert [line.partition(": ")[0] for line in found] == phrases
    for line in found:
        left, top, right, bottom = map(float, line.partition(": ")[2].split())
        assert -96 <= left <= right <= 192
        assert -96 <= top <= bottom <= 192
    assert written == str(drawn)
    assert Image.open(drawn).width >= 96


def test_ground_by_gradcam_shows_the_heat_of_each_phrase(folder, picture, tmp_path, monkeypatch):
    drawn = tmp_path / "drawn.png"
    found = lines_of("ground", picture, "a disc", "a star", "--model", folder, "--out", drawn, "--method", "gradcam")
    assert len(found) == 3 and Image.open(drawn).width > 600
    assert "expected box or gradcam" in error_of(
        monkeypatch, "ground", picture, "a", "--model", folder, "--method", "x"
    )
    assert "--layer is for --method gradcam" in error_of(monkeypatch, "ground", picture, "a", "--layer", "1")


def test_ground_draws_where_the_model_looks_for_each_word(folder, picture, tmp_path):
    drawn = tmp_path / "drawn.png"
    *_, first, second = lines_of("ground", picture, "a red disc", "star", "--words", "--model", folder, "--out", drawn)
    assert (first, second) == (str(drawn), str(tmp_path / "drawn-words.png"))
    strip = Image.open(second)
    before = strip.tobytes()  # two cross layers, of which the last has heat for [CLS] alone
    lines_of("ground", picture, "a red disc", "star", "--words", "--layer", 0, "--model", folder, "--out", drawn)
    assert before == Image.open(second).tobytes()
    assert strip.width == 5 * 220 + 6 * 12  # the picture, [CLS] and three words
    assert strip.height > 2 * 220


def test_ground_asks_the_heads_there_are(folder, picture, tmp_path, monkeypatch):
    arguments = ["ground", picture, "a disc", "--out", tmp_path / "drawn.png", "--model"]
    config = XVLM.from_pretrained(folder).config
    for name in ("box_head", "itm_head"):  # fine-tuned models have one of them
        Processor.from_pretrained(folder).save_pretrained(tmp_path / name)
        XVLM(config.model_copy(update={"heads": (name,)})).save_pretrained(tmp_path / name)
    assert len(lines_of(*arguments, tmp_path / "box_head")) == 2
    assert len(lines_of(*arguments, tmp_path / "itm_head", "--method", "gradcam")) == 2
    assert "the model has no box_head" in error_of(monkeypatch, *arguments, tmp_path / "itm_head")
    message = error_of(monkeypatch, *arguments, tmp_path / "box_head", "--method", "gradcam")
    assert "the model has no itm_head" in message
    assert "there is no itm_head" in error_of(monkeypatch, "calibrate", tmp_path / "box_head", tmp_path)


def test_calibrated_folders_say_whether_a_phrase_is_there(folder, picture, tmp_path, monkeypatch):
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "val", "--limit", 12)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    printed = lines_of("calibrate", copy, tmp_path / "shards/val")
    assert [line.partition(":")[0] for line in printed[:4]] == ["n_acc", "t_acc", "calibration_error", "absent"]
    found = lines_of("ground", picture, "the small red disc", "--model", copy, "--out", tmp_path / "drawn.png")[0]
    assert re.search(r"(not )?there \(\d\.\d\d\)$", found)
    looked = ["--method", "gradcam", "--model", copy, "--out", tmp_path / "drawn.png"]  # was not calibrated
    assert "there" not in lines_of("ground", picture, "the small red disc", *looked)[0]


def test_embed_writes_vectors_and_ends_with_status_1_where_an_image_was_skipped(monkeypatch, folder, picture, tmp_path):
    out, boxes = tmp_path / "vectors.npz", tmp_path / "boxes.jsonl"
    boxes.write_text('{"image": "scene.png", "boxes_xyxy": [[0, 0, 48, 96], [3, 4, 9, 90]]}\n')
    printed = lines_of("embed", picture, "--boxes", boxes, "--model", folder, "--out", out)
    assert printed[-1] == f"{out}: 1 image, 2 boxes, vectors of 8"
    with np.load(out) as kept:
        assert kept["ids"].tolist() == ["scene.png", "scene.png#0", "scene.png#1"]
        assert kept["model"] == str(folder)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:99])
    both = ["embed", str(picture), str(tmp_path / "broken.png")]
    ran = CliRunner().invoke(app, [*both, "--model", str(folder), "--out", str(out)])
    assert ran.exit_code == 1
    assert "broken.png: image cannot be decoded: " in ran.stdout
    assert ran.stdout.endswith("1 image, 0 boxes, vectors of 8; 1 image skipped\n")
    assert "--device banana: torch cannot use it" in error_of(monkeypatch, "embed", picture, "--device", "banana")
    boxes.write_text('{"image": "scene.png", "boxes_xyxy": [[0, 0, 97, 9]]}\n')
    message = error_of(monkeypatch, "embed", picture, "--boxes", boxes, "--model", folder, "--out", out)
    assert "boxes.jsonl, line 1: 1 of 1 boxes leave the image of 96 x 96 pixels" in message


def test_an_unknown_model_ends_in_one_line_that_names_the_shipped_ones(monkeypatch, picture, tmp_path):
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    (tmp_path / "weights/one-that-ships").mkdir(parents=True)
    message = error_of(monkeypatch, "ground", picture, "a star", "--model", "no-such-model")
    assert "no-such-model" in message
    assert "one-that-ships" in message


def test_a_missing_picture_and_missing_shards_end_in_one_line(monkeypatch, tmp_path):
    assert "absent.png" in error_of(monkeypatch, "ground", tmp_path / "absent.png", "a star")
    assert "absent" in error_of(monkeypatch, "data", "show", tmp_path / "absent")


def test_scenes_without_a_limit_end_in_one_line(monkeypatch, tmp_path):
    assert "number" in error_of(monkeypatch, "data", "pack", "scenes", tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    """An official file whose text side knows the words of scenes, and a folder with their tokenizer."""
    words = scenes.vocabulary()
    state = official.checkpoint(vocabulary=len(words))
    torch.save({"model": state, "config": {"max_tokens": 12, "image_res": 32}}, tmp_path / "official.th")
    Processor.from_vocabulary(words, ProcessorConfig()).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "official.th"


def captions(folder):
    """An official captioning file."""
    torch.save(official.checkpoint("captioning"), folder / "captions.th")
    return folder / "captions.th"


def test_convert_writes_a_folder_that_loads_right(checkpoint, tmp_path):
    out, tokenizer = tmp_path / "mine", tmp_path / "tokenizer"
    printed = lines_of("convert", checkpoint, out, "--image-size", 48, "--tokenizer", tokenizer)
    assert "renamed temp -> temperature" in printed
    assert any(line.startswith("dropped ") for line in printed)
    assert any(line.startswith("resized ") and "49 x 1 -> 121 x 1" in line for line in printed)
    model = XVLM.from_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    assert (
        printed[-1]
        == f"{out}: {parameters:,} parameters; {len(official.checkpoint()) - 7} renamed, 7 dropped, 3 resized"
    )
    config = Processor.from_pretrained(out).config
    assert (config.image_size, config.max_tokens) == ((48, 48), 12)
    assert {"config.json", "processor.json", "model.safetensors", "golden.safetensors", "README.md"} <= {
        file.name for file in out.iterdir()
    }
    assert lines_of("verify", out)[-1] == f"{out}: largest difference 0.0e+00, loads right"


@pytest.mark.parametrize(("task", "fresh"), [("nlvr", 6), ("vqa", 8)])
def test_convert_starts_another_task(checkpoint, tmp_path, task, fresh):
    out = tmp_path / "mine"
    printed = lines_of(
        "convert", checkpoint, out, "--task", task, "--image-size", 48, "--tokenizer", tmp_path / "tokenizer"
    )
    assert printed[0] == f"{checkpoint}: pretraining (Swin, BERT)"
    assert any(line.startswith("started fresh ") for line in printed)
    assert printed[-1].endswith(f"3 resized, {fresh} started fresh")
    assert lines_of("verify", out)[-1] == f"{out}: largest difference 0.0e+00, loads right"


@pytest.mark.parametrize("trunk", ["vit", "clip", "albef"])
def test_convert_takes_a_vit_at_another_size(tmp_path, trunk):
    torch.save({"model": official.checkpoint(trunk=trunk)}, tmp_path / "official.th")
    printed = lines_of("convert", tmp_path / "official.th", tmp_path / "mine", "--image-size", 48)
    assert "resized vision.trunk.pos_embed: 1 x 17 x 64 -> 1 x 37 x 64" in printed
    assert lines_of("verify", tmp_path / "mine")[-1].endswith("loads right")


def test_convert_finds_the_tokenizer_beside_the_file_or_says_that_there_is_none(checkpoint, tmp_path):
    assert any(line.startswith("no tokenizer: ") for line in lines_of("convert", checkpoint, tmp_path / "without"))
    lines_of("verify", tmp_path / "without")
    beside = checkpoint.rename(tmp_path / "tokenizer/official.th")
    lines_of("convert", beside, tmp_path / "with")
    assert Processor.from_pretrained(tmp_path / "with").vocab_size == len(scenes.vocabulary())


def test_convert_refuses_in_one_line_and_writes_nothing(monkeypatch, checkpoint, tmp_path):
    out = tmp_path / "mine"
    Processor.from_vocabulary([*scenes.vocabulary(), "extra"], ProcessorConfig()).save_pretrained(tmp_path / "other")
    message = error_of(monkeypatch, "convert", checkpoint, out, "--tokenizer", tmp_path / "other")
    words = len(scenes.vocabulary())
    assert f"the tokenizer has {words + 1} words, the model's embedding {words}" in message
    assert "multiples of 8" in error_of(monkeypatch, "convert", checkpoint, out, "--image-size", 50)
    assert "starts from none but" in error_of(monkeypatch, "convert", captions(tmp_path), out, "--task", "pretraining")
    assert "no task 'poems'; there are" in error_of(monkeypatch, "convert", checkpoint, out, "--task", "poems")
    assert "absent.th" in error_of(monkeypatch, "convert", tmp_path / "absent.th", out)
    torch.save(torch.load(checkpoint) | {"config": {"max_tokens": "many"}}, tmp_path / "odd.th")
    message = error_of(monkeypatch, "convert", tmp_path / "odd.th", out, "--tokenizer", tmp_path / "other")
    assert "odd.th, its config: max_tokens: " in message and "(found 'many')" in message
    (tmp_path / "page.th").write_text("<html>")
    assert "a web page, not a checkpoint" in error_of(monkeypatch, "convert", tmp_path / "page.th", out)
    assert not out.exists()


def test_verify_ends_with_status_1_where_a_folder_does_not_load_right(monkeypatch, folder):
    assert lines_of("verify", folder)[-1].endswith("loads right")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"norm_eps": 1e-12', '"norm_eps": 0.1'))  # the same tensors
    ran = CliRunner().invoke(app, ["verify", str(folder)])
    assert ran.exit_code == 1
    assert "DOES NOT LOAD RIGHT" in ran.stdout
    state = load_file(folder / "model.safetensors")
    save_file(state | {"text.norm.bias": state["text.norm.bias"] + 1e-6}, folder / "model.safetensors")
    assert "changed since golden.safetensors was written" in error_of(monkeypatch, "verify", folder)
    (folder / golden.FILE).unlink()
    assert "no golden.safetensors" in error_of(monkeypatch, "verify", folder)
    del state["text.norm.bias"]
    save_file(state, folder / "model.safetensors")
    assert "missing text.norm.bias" in error_of(monkeypatch, "verify", folder)


def test_a_processor_of_another_size_is_refused(monkeypatch, folder):
    Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=(48, 32))).save_pretrained(folder)
    message = error_of(monkeypatch, "verify", folder)
    assert "the processor makes images of 48 x 32 pixels, the model takes 32 x 32" in message


def test_half_a_processor_is_refused(monkeypatch, folder):
    (folder / "tokenizer.json").rename(folder / "away")
    assert f"{folder}: its tokenizer knows no words but" in error_of(monkeypatch, "verify", folder)
    (folder / "tokenizer.json").write_text("{")
    assert f"{folder}: no tokenizer can be made of its files" in error_of(monkeypatch, "verify", folder)
    (folder / "away").replace(folder / "tokenizer.json")
    (folder / "processor.json").unlink()
    assert "processor.json: no such configuration file" in error_of(monkeypatch, "verify", folder)


def test_a_tokenizer_of_another_model_is_refused(monkeypatch, folder, picture):
    Processor.from_vocabulary([*scenes.vocabulary(), "extra"], ProcessorConfig(image_size=32)).save_pretrained(folder)
    words = len(scenes.vocabulary())
    for arguments in (["verify", folder], ["ground", picture, "a star", "--model", folder]):
        message = error_of(monkeypatch, *arguments)
        assert f"the tokenizer has {words + 1} words, the model's embedding {words}" in message


def test_export_writes_a_folder_that_loads_right_with_a_card(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    (run / "results.json").write_text('{"commit": "abc", "seen/trained/mean_iou": 0.5}')
    (run / "config.yaml").write_text("out: here\n")
    out = tmp_path / "shared"
    assert "(float16)" in lines_of("export", run, out, "--half", "--data", "Scenes.", "--licence", "MIT")[-1]
    assert lines_of("verify", out)[-1].endswith("loads right")
    card = (out / "README.md").read_text()
    for part in (
        "# shared",
        "## Data\n\nScenes.",
        "## Licence\n\nMIT",
        "| seen | mean_iou | 0.500 |",
        "out: here",
        "license: mit",
    ):
        assert part in card


def test_push_uploads_what_loads_right(monkeypatch, folder):
    pushed = []
    monkeypatch.setattr(hub, "push", lambda folder, name, *, private: pushed.append((folder, name, private)) or "there")
    assert lines_of("push", folder, "org/mine", "--private")[-1] == "there"
    assert pushed == [(folder, "org/mine", True)]
    kept = load_file(folder / golden.FILE)
    save_file({name: tensor + 1 for name, tensor in kept.items()}, folder / golden.FILE)
    assert CliRunner().invoke(app, ["push", str(folder), "org/mine"]).exit_code == 1
    assert len(pushed) == 1


def test_layers_are_compared_and_the_best_is_stored_with_the_weights(folder, picture, tmp_path, monkeypatch):
    lines_of("data", "pack", "scenes", tmp_path / "shards", "--split", "val", "--limit", 4)
    asked = ["layers", folder, tmp_path / "shards/val"]
    title, heads, *rows = lines_of(*asked)
    assert "proposals: objects" in title and heads.split() == ["layer", "acc@0.5", "pointing_game", "energy_in_box"]
    values = [[float(cell) for cell in row.replace("*", "").split()] for row in rows]
    assert [int(row[0]) for row in values] == [0, 1] and all(0 <= cell <= 1 for row in values for cell in row[1:])
    best = max(values, key=lambda row: row[1])
    assert [row for row in rows if "*" in row] == [rows[int(best[0])]]
    assert lines_of(*asked, "--store", "--proposals", "none")[-1].startswith(f"{folder / 'gradcam.json'}: layer ")

    (folder / "gradcam.json").write_text(json.dumps({"weights": hub.sha256(folder / "model.safetensors"), "layer": 0}))
    ground = ["ground", picture, "a disc", "--model", folder, "--method", "gradcam", "--out"]
    pictures = {}
    for name, layer in (("stored", []), ("lower", ["--layer", 0]), ("upper", ["--layer", 1])):
        lines_of(*ground, tmp_path / f"{name}.png", *layer)
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["stored"] == pictures["lower"] != pictures["upper"]

    message = error_of(monkeypatch, *asked, "--proposals", tmp_path / "dets.json")
    assert "dets.json: no such file of proposals" in message
    assert "xvlm layers: pool: Input should be 'cells' or 'pixels'" in error_of(monkeypatch, *asked, "--pool", "x")
