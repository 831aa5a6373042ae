"""The two streams: the same batches whatever reads them, boxes on what is named, broken samples left out and named."""

import io
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from xvlm.config import ConfigError, load_config
from xvlm.data.images import decode_image
from xvlm.data.mentions import mentions
from xvlm.data.mixture import Mixture
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.reading import records
from xvlm.data.records import Object, Phrase, Record, Region
from xvlm.data.shards import Index, Shards
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import Stream, loader
from xvlm.data.words import WordMasking
from xvlm.data.writing import write_shards
from xvlm.types import Batch

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "square", "left", "right", "the", "flat", *COLOURS]
SIZE = (24, 32)
STILL = {"crop": "none", "hflip": 0.0, "randaugment": "none"}


def made(i: int, source: str = "made") -> tuple[Record, bytes]:
    """Three squares on grey, in places that depend on i; the caption is as long as i says."""
    image = Image.new("RGB", (60, 48), (90, 90, 90))
    boxes = {}
    for n, (name, colour) in enumerate(COLOURS.items()):
        left, top = 20 * n + i % 5, (7 * i + 11 * n) % 30
        boxes[name] = (left, top, left + 14, top + 16)
        image.paste(colour, boxes[name])
    caption = "the red square" + " flat" * (i % 4)
    record = Record(
        id=f"{source}{i}",
        source=source,
        width=60,
        height=48,
        captions=[caption],
        regions=[Region(box_xyxy=boxes["green"], descriptions=["green", "a green square"])],
        objects=[Object(box_xyxy=boxes["blue"], label="square", attributes=["blue", "flat"])],
        phrases=[Phrase(caption=0, start=4, end=7, boxes_xyxy=[boxes["red"]]), Phrase(caption=0, start=8, end=14)],
    )
    return record, encoded(image)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return Processor.from_vocabulary(VOCABULARY, ProcessorConfig(image_size=SIZE))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("shards")
    write_shards((made(i) for i in range(10)), parent / "a", samples_per_shard=3, progress=False)
    write_shards((made(i, "other") for i in range(4)), parent / "b", samples_per_shard=3, progress=False)
    return [parent / "a", parent / "b"]


def stream(folders, grain="region", images=4, workers=0, **more) -> StreamConfig:
    return StreamConfig(shards=folders, grain=grain, images=images, workers=workers, **more)


def batches(config, processor, n: int, start: int = 0, seed: int = 0, **place) -> list[Batch]:
    opened = loader(config, processor, WordMasking(), seed=seed, start=start, **place)
    return list(islice(opened, n))


def same(a: Batch, b: Batch) -> bool:
    tensors = [
        (a.images, b.images),
        *((getattr(a.texts, f), getattr(b.texts, f)) for f in ("ids", "mask")),
        *((getattr(a.masked, f), getattr(b.masked, f)) for f in ("ids", "hidden")),
        *((getattr(a.regions, f), getattr(b.regions, f)) for f in ("image", "boxes_cxcywh", "boxes_xywh", "whole")),
    ]
    return all(torch.equal(x, y) for x, y in tensors) and (a.ids, a.skipped) == (b.ids, b.skipped)


def said(batch: Batch) -> list[str]:
    """The texts of a batch, read back."""
    rows = zip(batch.texts.ids.tolist(), batch.texts.mask.tolist(), strict=True)
    return [" ".join(VOCABULARY[i] for i, m in zip(ids[1:], mask[1:], strict=True) if m) for ids, mask in rows]


def pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised images as RGB in 0 to 255, channels last."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (ProcessorConfig().mean, ProcessorConfig().std))
    return ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()


# Order.


@pytest.mark.parametrize("grain", ["caption", "region"])
def test_batches_do_not_depend_on_workers_or_start(folders, processor, grain):
    alone = batches(stream(folders, grain), processor, 6)
    helped = batches(stream(folders, grain, workers=2), processor, 6)
    resumed = batches(stream(folders, grain, workers=1), processor, 2, start=4)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert all(same(a, b) for a, b in zip(alone[4:], resumed, strict=True))
    assert not same(alone[0], batches(stream(folders, grain), processor, 1, seed=1)[0])


def test_a_stream_can_be_sent_to_a_process(folders, processor):
    config = stream(folders)
    sent = pickle.loads(pickle.dumps(Stream(config, processor, WordMasking(), 0, 0, 1, 1)))
    assert same(sent[3], batches(config, processor, 1, start=3)[0])


def test_processes_share_a_batch(folders, processor):
    config = stream(folders)
    for n, whole in enumerate(batches(config, processor, 4)):
        parts = [batches(config, processor, 1, start=n, rank=rank, world=2)[0] for rank in (0, 1)]
        assert whole.ids == parts[0].ids + parts[1].ids
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert said(whole) == said(parts[0]) + said(parts[1])
        assert torch.equal(whole.regions.boxes_xywh, torch.cat([part.regions.boxes_xywh for part in parts]))
        shifted = parts[1].regions.image + len(parts[0].ids)
        assert torch.equal(whole.regions.image, torch.cat([parts[0].regions.image, shifted]))


def test_turns_share_the_part_of_a_process(folders, processor):
    config = stream(folders, images=4)
    for n, whole in enumerate(batches(config, processor, 3)):
        in_turns = [
            batch for rank in (0, 1) for batch in batches(config, processor, 2, start=n, rank=rank, world=2, turns=2)
        ]
        assert list(whole.ids) == [name for batch in in_turns for name in batch.ids]
        assert said(whole) == [each for batch in in_turns for each in said(batch)]
        assert torch.cat([batch.places for batch in in_turns]).tolist() == list(range(4 * n, 4 * n + 4))
    with pytest.raises(ValueError, match="images: 4 cannot be divided among 2 processes with 4 turns each"):
        batches(config, processor, 1, world=2, turns=4)


def test_an_epoch_is_every_record_of_every_folder_once(folders, processor):
    ids = [name for batch in batches(stream(folders, images=7), processor, 6) for name in batch.ids]
    everything = sorted([f"made{i}" for i in range(10)] + [f"other{i}" for i in range(4)])
    epochs = [ids[at : at + 14] for at in (0, 14, 28)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_may_end_within_a_batch(folders, processor):
    ids = [name for batch in batches(stream(folders, images=4), processor, 7) for name in batch.ids]
    assert set(Counter(ids).values()) == {2}


def tiny(folder: Path, sizes: list[int], name: str) -> Path:
    """A packed folder with shards of these sizes, of images of a few pixels."""
    image = encoded(Image.new("RGB", (4, 4)))
    plain = {"source": "made", "width": 4, "height": 4, "captions": ["a"]}
    made = [(Record(id=f"{name}{i}", **plain), image) for i in range(sum(sizes))]
    for n, size in enumerate(sizes):
        write_shards(made[:size], folder / str(n), progress=False)
        made = made[size:]
    parts = [Index.model_validate_json((folder / f"{n}/index.json").read_bytes()) for n in range(len(sizes))]
    shards = [part.shards[0].model_copy(update={"file": f"{n}/000000.tar"}) for n, part in enumerate(parts)]
    (folder / "index.json").write_text(Index(counts={"records": sum(sizes)}, shards=shards).model_dump_json())
    return folder


def read_by_all(config: StreamConfig, processor, world: int, batches_of: range) -> list[str]:
    """Ids in the order of the run: batch by batch, process by process."""
    readers = [
        batches(config, processor, len(batches_of), start=batches_of.start, rank=rank, world=world)
        for rank in range(world)
    ]
    assert all(batch.ids for reader in readers for batch in reader)
    return [name for step in zip(*readers, strict=True) for batch in step for name in batch.ids]


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_uneven_shards_are_read_once_an_epoch_by_any_number_of_processes(tmp_path_factory, processor, data):
    """Also where a run is continued on another number of them, and with fewer shards than processes."""
    parent = tmp_path_factory.mktemp("uneven")
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
    folders = [tiny(parent / str(n), sizes, f"{n}-") for n, sizes in enumerate(shapes)]
    total = sum(map(sum, shapes))
    images = data.draw(st.sampled_from([12, 24]))  # by 1, 2, 3, 4 and 6
    config = stream(folders, "caption", images=images, augment=STILL)
    steps = -(-2 * total // images)
    worlds = [data.draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(2)]
    workers = data.draw(st.sampled_from([0, 0, 0, 2]))
    changed = data.draw(st.integers(0, steps))
    ids = read_by_all(config, processor, worlds[0], range(changed))
    config = config.model_copy(update={"workers": workers})
    ids += read_by_all(config, processor, worlds[1], range(changed, steps))
    epochs = ids[:total], ids[total : 2 * total]
    everything = {f"{n}-{i}" for n, sizes in enumerate(shapes) for i in range(sum(sizes))}
    assert all(len(epoch) == len(everything) and set(epoch) == everything for epoch in epochs)
    alone = read_by_all(config.model_copy(update={"workers": 0}), processor, 1, range(steps))
    assert ids == alone


def test_later_epochs_see_a_sample_otherwise(folders, processor):
    config = stream(folders[1:], "caption", images=4)
    first, second = batches(config, processor, 2)
    assert sorted(first.ids) == sorted(second.ids)
    assert not torch.equal(first.images[first.ids.index("other0")], second.images[second.ids.index("other0")])


@pytest.mark.parametrize(("name", "options"), [("images", {"images": 3}), ("max_texts", {"max_texts": 5})])
def test_what_cannot_be_divided_is_refused_at_once(folders, processor, name, options):
    with pytest.raises(ValueError, match=f"{name}: . cannot be divided among 2 processes"):
        loader(stream(folders, **{"images": 4} | options), processor, None, seed=0, start=0, world=2)


# Mixtures.


def mixed(folders, **more) -> StreamConfig:
    sources = {
        "green": {"shards": folders[:1], "kinds": ["region"], "weight": 3},
        "blue": {"shards": folders, "kinds": ["object"]},
    }
    return StreamConfig(sources=sources, grain="region", augment=STILL, **{"images": 8, "workers": 0} | more)


def test_sources_are_mixed_by_weight_and_counted_by_kind(folders, processor):
    read = batches(mixed(folders, with_caption=False), processor, 10)
    seen = sum((Counter(batch.seen) for batch in read), Counter())
    assert seen == {"green/images": 60, "green/regions": 60, "blue/images": 20, "blue/objects": 20}
    assert {text for batch in read for text in said(batch)} == {"green", "a green square", "blue square", "flat square"}
    ids = Counter(name for batch in read for name in batch.ids)
    assert {ids[f"made{i}"] for i in range(10)} <= {7, 8} and {ids[f"other{i}"] for i in range(4)} <= {1, 2}


def test_mixed_batches_do_not_depend_on_workers_processes_or_start(folders, processor):
    whole = batches(mixed(folders), processor, 4)
    helped = batches(mixed(folders, workers=2), processor, 2, start=2)
    assert all(same(a, b) for a, b in zip(whole[2:], helped, strict=True))
    parts = [batches(mixed(folders), processor, 1, start=3, rank=rank, world=4)[0] for rank in range(4)]
    assert whole[3].ids == sum((part.ids for part in parts), ())
    assert torch.equal(whole[3].images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("given", [{}, {"shards": ["a"], "sources": {"b": {"shards": ["b"]}}}, {"sources": {}}])
def test_shards_or_sources_are_given(given):
    with pytest.raises(ValidationError, match=r"either shards .* or sources"):
        StreamConfig(grain="caption", images=1, **given)


# Captions.


def test_caption_batches(folders, processor):
    (batch,) = batches(stream(folders, "caption", images=14, augment=STILL), processor, 1)
    assert batch.images.shape == (14, 3, *SIZE)
    assert batch.images.dtype == torch.float32
    assert said(batch) == ["the red square" + " flat" * (int(name[-1]) % 4) for name in batch.ids]
    assert batch.texts.ids.shape == (14, 4 + 3)
    assert batch.regions.image.tolist() == list(range(14))
    assert batch.regions.whole.all()
    assert batch.regions.boxes_cxcywh.tolist() == [[0.5, 0.5, 1.0, 1.0]] * 14
    assert batch.regions.boxes_xywh.tolist() == [[0.0, 0.0, 32.0, 24.0]] * 14
    assert batch.seen == {"made/images": 10, "made/captions": 10, "other/images": 4, "other/captions": 4}
    assert batch.skipped == ()
    for image, name in zip(batch.images, batch.ids, strict=True):
        expected = processor.pixel_values(decode_image(made(int(name[-1]))[1]))
        assert torch.equal(image, expected)


def test_hidden_words_are_marked_where_they_are(folders, processor):
    for batch in batches(stream(folders), processor, 3):
        hidden = batch.masked.hidden
        assert batch.masked.ids.shape == batch.texts.ids.shape
        assert not (hidden & ~batch.texts.mask).any()
        assert not hidden[:, 0].any()
        assert (hidden.sum(1) >= 1).all()
        assert torch.equal(batch.masked.ids[~hidden], batch.texts.ids[~hidden])
        assert (batch.masked.ids[hidden] == VOCABULARY.index("[MASK]")).any()


def test_without_masking_there_is_none(folders, processor):
    assert next(loader(stream(folders), processor, None, seed=0, start=0)).masked is None


# Regions.


def test_boxes_lie_on_what_is_named(folders, processor):
    config = stream(folders, with_caption=False, augment={"randaugment": "none"}, images=14)
    named = Counter()
    for batch in batches(config, processor, 4):
        shown = pixels(batch.images)
        for text, image, box in zip(said(batch), batch.regions.image, batch.regions.boxes_xywh, strict=True):
            colour = next((word for word in text.split() if word in COLOURS), "blue")  # "flat square" is the blue one
            x, y, w, h = box.tolist()
            if w < 3 or h < 3:
                continue
            centre = shown[image, int(y + h / 2), int(x + w / 2)]
            assert np.abs(centre - COLOURS[colour]).max() < 40, (text, centre)
            named[text] += 1
    assert set(named) == {"red", "green", "a green square", "blue square", "flat square"}


def test_targets_are_the_boxes_in_shares_of_the_image(folders, processor):
    for batch in batches(stream(folders), processor, 3):
        x, y, w, h = batch.regions.boxes_xywh.unbind(1)
        assert (x >= 0).all() and (y >= 0).all() and (x + w <= 32 + 1e-9).all() and (y + h <= 24 + 1e-9).all()
        expected = torch.stack([(x + w / 2) / 32, (y + h / 2) / 24, w / 32, h / 24], 1)
        assert torch.equal(batch.regions.boxes_cxcywh, expected.float())
        assert batch.regions.boxes_xywh.dtype == torch.float64  # rounding decides patches
        assert not batch.regions.whole.all()


def test_texts_about_a_flipped_image_say_so(tmp_path, processor):
    record, image = made(0)
    regions = [Region(box_xyxy=record.regions[0].box_xyxy, descriptions=["the left square"])]
    write_shards([(record.model_copy(update={"regions": regions}), image)], tmp_path / "s", progress=False)
    config = stream([tmp_path / "s"], images=1, kinds=["region"], with_caption=False, augment=STILL | {"hflip": 1.0})
    (batch,) = batches(config, processor, 1)
    assert said(batch) == ["the right square"]
    right = 32 / 60 * regions[0].box_xyxy[2]
    assert batch.regions.boxes_xywh[0, 0].item() == pytest.approx(32 - right)


def test_the_caption_takes_the_first_slot(folders, processor):
    (batch,) = batches(stream(folders, augment=STILL, max_regions=2, images=14), processor, 1)
    assert batch.regions.image.tolist() == [i for i in range(14) for _ in (0, 1)]
    assert batch.regions.whole.tolist() == [True, False] * 14
    assert {text.split()[0] for text in said(batch)[::2]} == {"the"}
    assert {text for text in said(batch)[1::2]} > {"red", "blue square"}  # parts in random order


def test_a_cap_drops_texts_at_random_without_repeating_any(folders, processor):
    everything, capped = (
        batches(stream(folders, augment=STILL, images=14, max_texts=most), processor, 1)[0] for most in (None, 20)
    )
    assert len(said(everything)) == 14 * 4
    assert len(said(capped)) == 20
    assert sum(n for what, n in capped.seen.items() if not what.endswith("/images")) == 20
    assert len(capped.ids) > 20 / 4  # not simply the first
    assert set(capped.regions.image.tolist()) == set(range(len(capped.ids)))  # no image without a text
    pairs = Counter(zip([capped.ids[i] for i in capped.regions.image], said(capped), strict=True))
    assert max(pairs.values()) == 1
    assert pairs.keys() <= set(
        zip([everything.ids[i] for i in everything.regions.image], said(everything), strict=True)
    )
    parts = [
        batches(stream(folders, augment=STILL, images=14, max_texts=20), processor, 1, rank=r, world=2)[0]
        for r in (0, 1)
    ]
    assert [len(said(part)) for part in parts] == [10, 10]


def test_a_region_stream_keeps_its_boxes_unless_told_otherwise(folders):
    def of(**more):
        augment = stream(folders, **more).augment
        return augment.crop, augment.randaugment, augment.hflip

    assert of() == ("keep_box", "colour", 0.5)
    assert of(augment={"hflip": 0.1}) == ("keep_box", "colour", 0.1)
    assert of(augment={"crop": "none"}) == ("none", "colour", 0.5)
    assert of(grain="caption") == ("random_resized", "full", 0.5)


def test_attributes_come_before_the_label():
    thing = Object(box_xyxy=(0, 0, 1, 1), label="dog", attributes=["big", "old", "wet"])
    record = Record(id="r", source="s", width=9, height=9, objects=[thing])

    def texts(attributes):
        return {mentions(record, ["object"], attributes, Random(seed))[0][1] for seed in range(200)}

    assert texts("one") == {"big dog", "old dog", "wet dog"}
    assert texts("all") == {"big old wet dog"}
    assert texts("some") == texts("one") | texts("all") | {"dog", "big old dog", "big wet dog", "old wet dog"}


def test_phrases_have_the_box_around_all_of_theirs():
    boxes = [(1.5, 2.0, 3.0, 8.0), (2.0, 1.0, 5.25, 4.0)]
    phrases = [Phrase(caption=0, start=0, end=8, boxes_xyxy=boxes), Phrase(caption=0, start=9, end=12)]
    record = Record(id="r", source="s", width=9, height=9, captions=["two dogs run"], phrases=phrases)
    found = [("phrase", "two dogs", (1.5, 1.0, 5.25, 8.0))]
    assert mentions(record, ["region", "object", "phrase"], "one", Random(0)) == found
    assert mentions(record, ["region", "object"], "one", Random(0)) == []


def test_kinds_choose_what_is_read(folders, processor):
    config = stream(folders, kinds=["phrase"], with_caption=False, augment=STILL)
    assert set(said(batches(config, processor, 1)[0])) == {"red"}


def told(tmp_path, processor, **more) -> list[Batch]:
    """Forty visits of one record with three captions, which are `left`, `right` and `the`."""
    record = made(0)[0].model_copy(update={"captions": ["left", "right", "the"], "phrases": []})
    write_shards([(record, made(0)[1])], tmp_path / "s", progress=False)
    return batches(stream([tmp_path / "s"], images=1, augment=STILL, **more), processor, 40)


@pytest.mark.parametrize(("captions", "expected"), [("first", {"left"}), ("any", {"left", "right", "the"})])
def test_captions_are_the_first_or_any_of_a_record(tmp_path, processor, captions, expected):
    read = told(tmp_path, processor, captions=captions, max_regions=2)
    assert {said(batch)[0] for batch in read} == expected
    assert all(batch.regions.whole.tolist() == [True, False] for batch in read)


def test_several_captions_of_a_record_are_different_ones(tmp_path, processor):
    read = told(tmp_path, processor, max_captions=2, max_regions=3)
    pairs = {("left", "right"), ("left", "the"), ("right", "the")}
    assert {tuple(sorted(said(batch)[:2])) for batch in read} == pairs
    assert all(batch.regions.whole.tolist() == [True, True, False] for batch in read)


def test_captions_that_leave_no_room_for_regions_are_refused(folders):
    with pytest.raises(ValueError, match="max_captions 5 leave no region among the 5 texts"):
        stream(folders, max_captions=5, max_regions=5)


# Broken samples.


def with_broken(folder: Path, good: int = 8) -> Path:
    """Good samples and one of each kind that cannot be used."""
    record, image = made(90)
    plain = {"source": "made", "width": 60, "height": 48}
    samples = [made(i) for i in range(good)]
    samples += [
        (record.model_copy(update={"id": "cut"}), image[:-40]),
        (Record(id="size", captions=["a"], **plain | {"width": 61}), image),
        (Record(id="silent", **plain), image),
        (
            Record(id="dots", captions=["..."], regions=[Region(box_xyxy=(0, 0, 9, 9), descriptions=["?"])], **plain),
            image,
        ),
    ]
    write_shards([*samples, (record.model_copy(update={"id": "garbled"}), image)], folder, progress=False)
    offset = int(Shards(folder)._extents[-1, 2])
    with (folder / "000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0\0\0\0")
    return folder


@pytest.mark.parametrize("grain", ["caption", "region"])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_left_out_and_named(tmp_path, processor, grain, workers):
    folder = with_broken(tmp_path / "s")
    config = stream([folder], grain, images=13, workers=workers)
    (batch,) = batches(config, processor, 1)
    assert sorted(batch.ids) == [f"made{i}" for i in range(8)]
    reasons = dict(line.split(": ", 1) for line in batch.skipped)
    assert reasons.keys() == {f"s/000000.tar/{name}" for name in ("cut", "size", "silent", "dots", "garbled")}
    assert "cannot be decoded" in reasons["s/000000.tar/cut"]
    assert "image is 60x48, the record says 61x48" in reasons["s/000000.tar/size"]
    assert "the record has no" in reasons["s/000000.tar/silent"]
    assert "no text has words" in reasons["s/000000.tar/dots"]
    assert "not a record" in reasons["s/000000.tar/garbled"]


def test_a_process_is_left_with_the_next_sample_that_can_be_used(tmp_path, processor):
    """So that every process has a batch; what is broken is named once, when its turn comes."""
    good = {f"made{i}" for i in range(3)}
    config = stream([with_broken(tmp_path / "s", good=3)], images=2)
    order = Mixture({"": [8]}, {"": 1.0}, seed=0)
    names = [Shards(tmp_path / "s").key(order.at(position)[2]) for position in range(40)]
    for rank in (0, 1):
        mine = names[rank::2]
        for n, batch in enumerate(batches(config, processor, 8, rank=rank, world=2)):
            assert batch.ids == (next(name for name in mine[n:] if name in good),)
            assert [line.split(":")[0].split("/")[-1] for line in batch.skipped] == [mine[n]] * (mine[n] not in good)
        turns = loader(config, processor, WordMasking(), seed=0, start=0, rank=0, world=1, turns=2)
        found = [batch.ids for batch in islice(turns, 16)][rank::2]
        assert found == [batch.ids for batch in batches(config, processor, 8, rank=rank, world=2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_are_cut_or_go_while_they_are_read_cost_their_samples_only(tmp_path, processor, workers):
    write_shards((made(i) for i in range(12)), tmp_path / "s", samples_per_shard=3, progress=False)
    opened = loader(stream([tmp_path / "s"], images=12, workers=workers), processor, None, seed=0, start=0)
    shards = Shards(tmp_path / "s")
    (tmp_path / "s/000001.tar").unlink()
    with (tmp_path / "s/000002.tar").open("r+b") as file:
        file.truncate(int(shards._extents[7, 0]) + 10)  # within the second image of three
    lost = {f"made{i}" for i in (3, 4, 5, 7, 8)}
    for batch in islice(opened, 3):
        assert sorted(batch.ids) == sorted({f"made{i}" for i in range(12)} - lost)
        reasons = dict(line.removeprefix("s/").split(": ", 1) for line in batch.skipped)
        assert {place.split("/")[1] for place in reasons} == lost
        assert all(
            ("cannot be read" if place.startswith("000001") else "the shard ends early") in reason
            for place, reason in reasons.items()
        )


def test_too_many_skipped_samples_end_the_run(tmp_path, processor):
    folder = with_broken(tmp_path / "s", good=95)
    assert len(batches(stream([folder], images=50, max_skipped_share=0.2), processor, 6)) == 6
    with pytest.raises(RuntimeError, match=r"(?s)of 200 samples were skipped.*0\.01.*s/000000\.tar/"):
        batches(stream([folder], images=50, max_skipped_share=0.01), processor, 6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_which_nothing_is_left_names_its_samples(tmp_path, processor, workers):
    record, _ = made(0)
    cut = [(record.model_copy(update={"id": f"cut{i}"}), b"\xff\xd8\xff") for i in range(2)]
    write_shards(cut, tmp_path / "s", progress=False)
    with pytest.raises(RuntimeError, match=r"(?s)no sample of a batch.*cut\d: image cannot be decoded.*cut\d: "):
        batches(stream([tmp_path / "s"], images=2, workers=workers), processor, 1)


def test_unknown_keys_are_refused(folders, tmp_path):
    with pytest.raises(ValidationError, match="image_count"):
        stream(folders, image_count=3)
    (tmp_path / "stream.yaml").write_text("shards: [a]\ngrain: region\nimages: 4\naugment: {hflop: 0.5}\n")
    with pytest.raises(ConfigError, match=r"stream\.yaml.*augment\.hflop"):
        load_config(StreamConfig, tmp_path / "stream.yaml")
    with pytest.raises(ValidationError, match="kinds"):
        stream(folders, kinds=[])


def test_shards_that_are_not_there_are_missed_at_once(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*index\.json"):
        loader(stream([tmp_path / "nowhere"]), processor, None, seed=0, start=0)


# Evaluation.


def test_evaluation_reads_each_record_once_in_order(folders, processor):
    shards = Shards(folders[0])
    indices = [7, 2, 9, 0, 4]
    read = list(records(shards, processor, indices, 2))
    assert [len(some) for some, _ in read] == [2, 2, 1]
    assert [record for some, _ in read for record in some] == [made(i)[0] for i in indices]
    expected = torch.stack([processor.pixel_values(decode_image(made(i)[1])) for i in indices])
    assert torch.equal(torch.cat([images for _, images in read]), expected)


def test_evaluation_leaves_out_what_is_broken_and_says_so(tmp_path, processor, caplog):
    shards = Shards(with_broken(tmp_path / "s", good=2))
    read = [record.id for some, _ in records(shards, processor, range(len(shards)), 3) for record in some]
    assert read == ["made0", "made1", "silent", "dots"]
    assert "left out 3 of 7 records" in caplog.text
    assert "000000.tar/cut: image cannot be decoded" in caplog.text
