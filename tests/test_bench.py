"""The naive step is the same step, packing and sharing change no number, the command prints and writes what it says.

Speed is never asserted.
"""

import json
from random import Random

import pytest
import tiny
import torch
from test_cli import error_of, lines_of
from test_model import VIT

from xvlm.bench import data as reading
from xvlm.bench import measure, retrieval
from xvlm.bench import step as bench
from xvlm.bench.naive import fuse_padded, naive_losses, read_padded
from xvlm.data.prepare import Preparation
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.shards import Shards
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import loader
from xvlm.data.writing import write_shards
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.types import Texts, Words

TRUNKS = pytest.mark.parametrize("vision", [tiny.VISION, VIT], ids=["swin", "vit"])


def gradients(model, losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@TRUNKS
@pytest.mark.parametrize("texts_per_image", [1, 3])
def test_the_naive_step_has_the_same_losses_and_gradients(vision, texts_per_image):
    config = tiny.CONFIG.model_copy(update={"vision": vision})
    model = tiny.model(config)
    batch = bench.make_batch(config, 3, texts_per_image, torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # both draw the same negatives
    packed = Task(PretrainingConfig(), model).losses(batch, boxes=True)
    torch.manual_seed(1)
    naive = naive_losses(model, batch)
    assert packed.keys() == naive.keys()
    for name, loss in packed.items():
        torch.testing.assert_close(naive[name], loss, atol=1e-5, rtol=0, msg=name)
    expected, got = gradients(model, packed), gradients(model, naive)
    # Without a region there is no box, but the naive step still asks for one and throws the answer away.
    assert expected.keys() <= got.keys()
    for name, gradient in got.items():
        other = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4, msg=name)


def one(texts: Texts, i: int) -> Texts:
    return Texts(texts.ids[i : i + 1], texts.mask[i : i + 1])


@TRUNKS
def test_packed_padded_shared_and_unshared_give_the_same_numbers(vision):
    model, batch = tiny.model(tiny.CONFIG.model_copy(update={"vision": vision})), tiny.batch()
    concepts = model.encode_image(batch.images, batch.regions)
    # Right pairs and wrong ones, texts and images that come again, whole images and regions.
    of = torch.tensor([0, 1, 2, 1, 1, 8, 5, 0])
    about = torch.tensor([3, 4, 5, 0, 4, 1, 11, 2])
    only = batch.masked.hidden[of]
    only[::2, 0] = True

    def same(got: Words, expected: torch.Tensor) -> None:
        """``expected``: padded states of every word of every question."""
        torch.testing.assert_close(got.states, expected[got.mask], atol=1e-5, rtol=1e-5)

    words = model.encode_text(batch.texts)
    padded = read_padded(model.text, batch.texts.ids, batch.texts.mask)
    same(words, padded)
    for i in range(len(batch.texts.ids)):
        same(model.encode_text(one(batch.texts, i)), padded[i : i + 1])

    expected = fuse_padded(model, padded[of], batch.texts.mask[of], concepts.take(about))
    same(model.fuse(words, concepts, about, of), expected)  # one call, shared
    same(model.fuse(words.take(of), concepts, about), expected)  # one call, each question with a text of its own
    same(model.fuse(words, concepts, about, of, only), expected)  # only the words wanted
    same(model.fuse(words.take(of), concepts, about, only=only), expected)
    for q in range(len(of)):  # a call each
        row, text = slice(q, q + 1), int(of[q])
        same(model.fuse(words, concepts, about[row], of[row]), expected[row])
        same(model.fuse(words, concepts, about[row], of[row], only[row]), expected[row])
        alone = model.encode_text(one(batch.texts, text))  # a text packed with no other
        same(model.fuse(alone, concepts.take(about[row]), torch.tensor([0])), expected[row])


def test_batches_look_like_real_ones():
    batch = bench.make_batch(bench.SIZES["tiny"], 200, 5, torch.Generator().manual_seed(0))
    lengths, hidden = batch.texts.mask.sum(1), batch.masked.hidden
    assert batch.texts.ids.shape == (1000, bench.PADDED_TO)
    assert lengths[batch.regions.whole].float().mean() == pytest.approx(bench.CAPTION, abs=0.7)
    assert lengths[~batch.regions.whole].float().mean() == pytest.approx(bench.REGION, abs=0.7)
    assert batch.regions.whole.sum() == 200
    assert (hidden.sum(1) >= 1).all()
    last = lengths - 1
    assert not (hidden & ~batch.texts.mask).any() and not hidden[:, 0].any()
    assert not hidden[torch.arange(1000), last].any()
    assert torch.equal(batch.masked.ids != batch.texts.ids, hidden)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1000)

    def work():
        for _ in range(3):
            y = x + 1  # made anew each time, beside the one before
            y.view(10, 100).mul_(2)  # the same memory

    assert measure.peak_bytes(torch.device("cpu"), work) == 2 * 4000


def test_peaks_are_found_by_name():
    assert measure.known_peak("NVIDIA A100-SXM4-80GB") == measure.PEAK_TFLOPS["A100"]
    assert measure.known_peak("NVIDIA H100 PCIe") == measure.PEAK_TFLOPS["H100 PCIe"]
    assert measure.known_peak("NVIDIA H100 80GB HBM3") == measure.PEAK_TFLOPS["H100"]
    assert measure.known_peak("cpu") is None


@pytest.fixture
def tinier(monkeypatch):
    """No wait for the words of a real vocabulary and for a large product."""
    monkeypatch.setitem(bench.SIZES, "tiny", tiny.CONFIG)
    monkeypatch.setattr(measure, "large_product", lambda device, dtype: lambda: 1000)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_prints_a_table_and_writes_numbers(tinier, tmp_path, precision):
    file = tmp_path / "numbers.json"
    asked = ["--size", "tiny", "--images", 2, "--texts-per-image", 3, "--threads", 1, "--repeats", 2]
    printed = lines_of("bench", "step", *asked, "--precision", precision, "--peak-tflops", 1, "--json", file)
    written = json.loads(file.read_text())
    assert (written["images"], written["texts"], written["precision"]) == (2, 6, precision)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed if line.startswith("| ")]
    assert rows[2:6] == ["forward, ms", "forward and backward, ms", "full step, ms", "images/s"]
    assert any(row.startswith("MFU") for row in rows)
    assert written["loss_difference"] < 1e-5
    assert written["gradient_difference"] < 1e-4
    for step in (written["naive"], written["packed"]):
        assert 0 < step["forward"] <= step["forward_backward"] <= step["full"]
        assert step["images_per_s"] == pytest.approx(2 / step["full"])
        assert step["peak_bytes"] > 0
        assert 0 < written["image_flops"] < step["forward_flops"] < step["flops"]
    assert written["expected"] > 1  # counted, not timed: padding, copies and unused logits are more work


def test_what_cannot_be_measured_ends_in_one_line(monkeypatch):
    step = ("bench", "step", "--threads", 1)
    assert "tiny, small, base" in error_of(monkeypatch, *step, "--size", "huge")
    assert "fp32, bf16" in error_of(monkeypatch, *step, "--precision", "fp8")
    assert "cpu, cuda" in error_of(monkeypatch, *step, "--device", "abacus")
    assert "two images or texts" in error_of(monkeypatch, *step, "--images", 1, "--texts-per-image", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in error_of(monkeypatch, *step, "--device", "cuda")


def test_both_ways_of_re_ranking_score_the_same_candidates_alike():
    result = retrieval.bench_retrieval("tiny", images=5, texts_per_image=3, top_k=4, device="cpu", repeats=1)
    assert result.score_difference < 1e-4
    assert result.pairs_asked == 5 * 4 + 15 * 4 and 40 <= result.pairs_scored < result.pairs_asked
    assert result.flops < result.naive_flops / 3
    assert result.lines()[5].startswith("| re-ranking, s |")


# Reading.


@pytest.fixture
def photographs(tmp_path):
    write_shards((reading.photograph(i, (96, 72)) for i in range(5)), tmp_path / "s", progress=False)
    return Shards(tmp_path / "s")


@pytest.mark.parametrize("grain", ["caption", "region"])
def test_the_plain_way_gives_the_same_images(photographs, grain):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    processor = Processor.from_vocabulary(words, ProcessorConfig(image_size=(24, 32)))
    still = {"crop": "none", "hflip": 0.0, "randaugment": "none"}
    config = StreamConfig(shards=[photographs.folder], grain=grain, images=5, workers=0, augment=still)
    batch = next(loader(config, processor, None, seed=0, start=0))
    number = {photographs.key(i): i for i in range(5)}
    for name, image in zip(batch.ids, batch.images, strict=True):
        plain = reading.read_plainly(*photographs.read(number[name]), config, processor, Random(0))
        torch.testing.assert_close(plain, image, atol=1e-5, rtol=0)


def test_reading_is_measured_as_a_stream_of_each_kind(photographs, tmp_path):
    file = tmp_path / "numbers.json"
    asked = ["--images", 5, "--batch", 2, "--size", 32, "--repeats", 2, "--clock", "cpu", "--json", file]
    printed = lines_of("bench", "data", photographs.folder, *asked)
    written = json.loads(file.read_text())
    assert (written["mean_size"], written["size"], written["clock"]) == ([96, 72], [32, 32], "cpu")
    assert [one["grain"] for one in written["readings"]] == ["caption", "region"]
    for one in written["readings"]:
        assert (one["images"], one["skipped"]) == (4, 0)  # whole batches
        assert one["texts"] == 4 if one["grain"] == "caption" else one["texts"] > 4
        assert list(one["seconds"]) == ["plain", "exact", "fast"]
        assert all(seconds > 0 for seconds in one["seconds"].values())
        for shares in one["shares"].values():
            assert list(shares) == list(reading.PARTS)
            assert sum(shares.values()) == pytest.approx(1)
            assert all(share > 0 for share in shares.values())
    assert "| of our time | read | decode | augment | words | batch |" in printed


def test_smaller_images_are_measured_beside_their_originals(photographs, tmp_path, monkeypatch):
    samples = (photographs.read(i) for i in range(5))
    write_shards(samples, tmp_path / "small", prepare=Preparation(max_side=48), progress=False)
    read: list[tuple[int, int]] = []
    plainly = reading.read_plainly
    monkeypatch.setattr(
        reading,
        "read_plainly",
        lambda record, *rest: read.append((record.width, record.height)) or plainly(record, *rest),
    )
    asked = ["--size", 32, "--repeats", 1, "--originals", photographs.folder]
    printed = lines_of("bench", "data", tmp_path / "small", *asked)
    assert "images of 48x36 pixels" in printed[0] and f"the plain way reads {photographs.folder}" in printed[1]
    assert set(read) == {(96, 72)}
    others = [(record.model_copy(update={"id": "another"}), image) for record, image in [photographs.read(0)]]
    write_shards(others, tmp_path / "others", progress=False)
    said = error_of(monkeypatch, "bench", "data", tmp_path / "others", *asked)
    assert f"{photographs.folder}: there is no record 'another'" in said


def test_a_kind_of_record_that_is_not_there_is_left_out(photographs, tmp_path, monkeypatch):
    captioned = [
        (record.model_copy(update={"regions": []}), image) for record, image in map(photographs.read, range(5))
    ]
    write_shards(captioned, tmp_path / "c", progress=False)
    printed = lines_of("bench", "data", tmp_path / "c", "--size", 32, "--repeats", 1)
    assert any(line.startswith("| caption | 5, 5 |") for line in printed)
    assert not any("region" in line for line in printed)
    silent = [(record.model_copy(update={"captions": []}), image) for record, image in captioned]
    write_shards(silent, tmp_path / "n", progress=False)
    assert "no record has a caption or a box" in error_of(monkeypatch, "bench", "data", tmp_path / "n", "--size", 32)
    assert "wall or cpu" in error_of(monkeypatch, "bench", "data", tmp_path / "c", "--clock", "sun")


def test_without_a_folder_photographs_are_made():
    printed = lines_of("bench", "data", "--made", 96, 72, "--images", 3, "--size", 32, "--repeats", 1)
    assert printed[0].startswith("3 photographs made here: images of 96x72 pixels")
