"""The real script on two processes, reading a mixture from a disk, a pipe and a URL, some of it damaged, killed on the
way: what was seen of each source is what an undisturbed run sees.
"""

import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from xvlm import runlog, states
from xvlm.data import scenes
from xvlm.data.writing import write_shards

ROOT = Path(__file__).parents[1]
STEPS = 16
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/demo.yaml"]
CONFIG = """
title: Sources
out: {out}
tokenizer: scenes
processor: {{image_size: 32, max_tokens: 16}}
model:
  vision: {{trunk: resnet10t, options: {{channels: [8, 8, 16, 16]}}, image_size: [32, 32]}}
  text: {{vocab_size: 248, dim: 32, heads: 2, feed_forward: 32, text_layers: 1, cross_layers: 1, max_positions: 16}}
  embed_dim: 16
streams:
  caption: &stream
    grain: caption
    images: 8
    workers: 2
    cache: {{folder: {cache}}}
    sources:
      disk: {{shards: ["{folder}/disk"], weight: 2}}
      pipe: {{shards: ["pipe:cat {folder}/pipe/000000.tar"], weight: 1}}
      url: {{shards: ["http://127.0.0.1:{port}/url/000000.tar"], weight: 1}}
  region: {{<<: *stream, grain: region}}
train: {{steps: 16, save_every: 2, log_every: 1, keep: 99}}
evaluation: {{untrained: false, slices: {{}}}}
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """Three sources in a folder that is served, and the port; one tar is cut, in another an image is no image."""
    folder = tmp_path / "sources"
    for name, split in (("disk", "train"), ("pipe", "val"), ("url", "test")):
        samples = scenes.samples(scenes.SceneConfig(size=32), split, 40)
        write_shards(samples, folder / name, samples_per_shard=40, progress=False)
    with tarfile.open(folder / "pipe/000000.tar") as tar:
        images = [member for member in tar.getmembers() if not member.name.endswith(".json")]
    with (folder / "pipe/000000.tar").open("r+b") as file:
        file.truncate(images[-5].offset_data + 10)  # the last five are gone
    with (folder / "url/000000.tar").open("r+b") as file:
        with tarfile.open(folder / "url/000000.tar") as tar:
            image = next(member for member in tar if not member.name.endswith(".json"))
        file.seek(image.offset_data)
        file.write(bytes(image.size))
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, server.server_address[1], image.name.partition(".")[0]
        server.shutdown()


def start(out: Path, folder: Path, port: int) -> subprocess.Popen:
    config = out.with_suffix(".yaml")
    config.write_text(CONFIG.format(out=out, folder=folder, port=port, cache=out.parent / f"cache-{out.name}"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = out.with_suffix(".txt").open("a")
    command = [*LAUNCH, ROOT / "pretrain/train.py", config]
    return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("curl") is None, reason="URLs are opened with curl, which is not installed")
def test_a_mixture_from_everywhere_killed_and_continued_is_the_undisturbed_one(served, tmp_path):
    folder, port, broken = served
    assert start(tmp_path / "straight", folder, port).wait() == 0, (tmp_path / "straight.txt").read_text()[-3000:]
    killed = start(tmp_path / "killed", folder, port)
    while len(runlog.read_log(tmp_path / "killed")) < 5:
        assert killed.poll() is None, (tmp_path / "killed.txt").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)  # the launcher, both processes and all their workers
    killed.wait()
    assert 2 <= int(states.states(tmp_path / "killed")[0].name) < STEPS
    assert start(tmp_path / "killed", folder, port).wait() == 0, (tmp_path / "killed.txt").read_text()[-3000:]

    logs = [runlog.read_log(tmp_path / name) for name in ("straight", "killed")]
    assert [line["seen"] for line in logs[0]] == [line["seen"] for line in logs[1]]
    saved = [torch.load(states.states(tmp_path / name)[0] / "state.pt") for name in ("straight", "killed")]
    assert saved[0]["seen"] == saved[1]["seen"] and saved[0]["positions"] == saved[1]["positions"]
    assert all(torch.equal(tensor, saved[1]["task"][name]) for name, tensor in saved[0]["task"].items())
    seen, skipped = saved[0]["seen"], saved[0]["seen"]["skipped"]
    images = {name: seen[f"caption/{name}/images"] for name in ("disk", "pipe", "url")}
    assert images["disk"] == 8 * STEPS // 2 and images["pipe"] == 8 * STEPS // 4  # of 2 : 1 : 1
    assert sum(v for k, v in seen.items() if k.endswith("/images")) + skipped == 8 * sum(saved[0]["positions"].values())
    assert skipped > 0 and logs[0][-1]["skipped"] == skipped
    for name in ("straight", "killed"):
        said = (tmp_path / f"{name}.txt").read_text()
        assert f"{broken}: image cannot be decoded" in said
        assert "pipe/000000.tar: 35 of " in said
