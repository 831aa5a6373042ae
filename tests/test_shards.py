"""Shards: what goes in comes out, webdataset reads them, damage is named, every epoch is a permutation."""

import io
import multiprocessing
import pickle

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xvlm.data.records import Object, Question, Record, Region
from xvlm.data.shards import BrokenSample, Shards, epoch_order
from xvlm.data.writing import write_shards


def encoded(colour: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 0, 255)).save(file, kind)
    return file.getvalue()


def sample(i: int, kind: str = "JPEG", **more) -> tuple[Record, bytes]:
    region = Region(box_xyxy=(0, 0, 4, 4.5), descriptions=["größer than a dog"])
    fields = {"id": f"r{i}", "source": "made", "width": 8, "height": 6, "captions": ["a", "b"], "regions": [region]}
    return Record(**fields | more), encoded(i, kind)


def samples(n: int) -> list[tuple[Record, bytes]]:
    return [sample(i, ("JPEG", "PNG", "WEBP")[i % 3]) for i in range(n)]


@pytest.fixture
def packed(tmp_path):
    write_shards(samples(7), tmp_path / "s", samples_per_shard=3, progress=False)
    return tmp_path / "s"


def test_what_goes_in_comes_out_in_any_order(packed):
    shards, expected = Shards(packed), samples(7)
    assert len(shards) == 7
    assert shards.sizes == [3, 3, 1]
    for i in (6, 0, 3, 5, 1, 4, 2):
        assert shards.read(i) == expected[i]
        assert shards.key(i) == f"r{i}"
        assert shards.shard_of(i) == i // 3
    for i in (-1, 7):
        with pytest.raises(IndexError, match="of 7"):
            shards.read(i)


def test_webdataset_reads_the_same(packed):
    files = [str(file) for file in Shards(packed).files]
    read = list(webdataset.WebDataset(files, shardshuffle=False))
    expected = samples(7)
    assert [one["__key__"] for one in read] == [record.id for record, _ in expected]
    for one, (record, image) in zip(read, expected, strict=True):
        assert Record.model_validate_json(one["json"]) == record
        assert [one[kind] for kind in ("jpg", "png", "webp") if kind in one] == [image]


def test_a_long_id_is_no_trouble(tmp_path):
    made = sample(0, id="ü" * 90)
    write_shards([made], tmp_path, progress=False)
    assert Shards(tmp_path).read(0) == made


def test_index_counts_and_describes(tmp_path):
    box = (0.0, 0.0, 1.0, 1.0)
    full = sample(0, objects=[Object(box_xyxy=box, label="dog")] * 3, questions=[Question(text="is it", answers={})])
    index = write_shards([full, sample(1)], tmp_path, description={"reader": "made"}, progress=False)
    counts = {"records": 2, "captions": 4, "regions": 2, "objects": 3, "questions": 1}
    assert index.counts == counts | {"phrases": 0, "expressions": 0, "statements": 0}
    assert Shards(tmp_path).counts == index.counts
    assert Shards(tmp_path).description == {"reader": "made"}


def test_the_same_samples_give_the_same_bytes(packed, tmp_path):
    write_shards(samples(7), tmp_path / "again", samples_per_shard=3, progress=False)
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_packing_that_was_cut_short_starts_again(tmp_path):
    def interrupted():
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path, samples_per_shard=2, progress=False)
    assert len(list(tmp_path.glob("*.tar"))) == 2
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        Shards(tmp_path)
    write_shards(samples(2), tmp_path, samples_per_shard=2, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "index.json"]
    with pytest.raises(FileExistsError, match="packed already"):
        write_shards(samples(2), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([sample(0), sample(1), sample(0)], "'r0'.*twice"),
        ([sample(0, id="a.b")], "'a.b'.*no dot"),
        ([(sample(0)[0], b"GIF89a and more")], "'r0'.*JPEG, PNG or WebP.*GIF89a"),
        ([], "no samples"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        write_shards(bad, tmp_path, samples_per_shard=1, progress=False)
    assert not (tmp_path / "index.json").exists()


def test_missing_shard_is_named_at_once(packed):
    (packed / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards.*000001\.tar"):
        Shards(packed)


def test_index_that_cannot_be_read_is_named(packed):
    (packed / "index.json").write_text('{"version": 2, "counts": {}, "shards": []}')
    with pytest.raises(ValueError, match=r"index\.json: version"):
        Shards(packed)
    (packed / "index.json").write_text('{"version"')
    with pytest.raises(ValueError, match=r"index\.json"):
        Shards(packed)


def test_truncated_shard_loses_only_what_was_cut(packed):
    shards = Shards(packed)
    with (packed / "000000.tar").open("r+b") as file:
        file.truncate(int(shards._extents[1, 0]) + 10)  # within the second image
    assert shards.read(0) == samples(7)[0]
    for i in (1, 2):
        with pytest.raises(BrokenSample, match=rf"000000\.tar/r{i}: the shard ends early"):
            shards.read(i)
    assert shards.read(3) == samples(7)[3]


def test_records_leave_out_what_is_broken_and_say_so(packed, caplog):
    shards = Shards(packed)
    assert [record.id for record in shards.records()] == [f"r{i}" for i in range(7)] and not caplog.records
    with (packed / "000000.tar").open("r+b") as file:
        file.truncate(int(shards._extents[1, 0]) + 10)  # of the first shard's three samples one is left
    assert [record.id for record in Shards(packed).records()] == ["r0", "r3", "r4", "r5", "r6"]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        f"{packed}/000000.tar/r{i}" for i in (1, 2)
    ]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda document: b"\0" * len(document), "not a record: json"),
        (lambda document: document.replace(b'"r4"', b'"r5"'), "holds the record 'r5' here"),
        (lambda document: document.replace(b'"width":8', b'"width":3'), "not a record.*regions.0"),
        (lambda document: document.replace(b'"width"', b'"widht"'), "not a record: width"),
    ],
)
def test_damaged_member_is_named(packed, damage, reason):
    shards = Shards(packed)
    offset, size = shards._extents[4, 2:].tolist()
    with (packed / "000001.tar").open("r+b") as file:
        file.seek(offset)
        document = file.read(size)
        assert damage(document) != document
        file.seek(offset)
        file.write(damage(document))
    with pytest.raises(BrokenSample, match=rf"000001\.tar/r4: .*{reason}") as caught:
        shards.read(4)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert shards.read(5) == samples(7)[5]


def test_other_processes_read_too(packed):
    shards = Shards(packed)
    shards.read(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(shards.read, range(7)) == samples(7)  # sent there by pickle, after a file was opened here


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("xvlm.data.shards.OPEN_AT_ONCE", 2)
    write_shards(samples(6), tmp_path, samples_per_shard=1, progress=False)
    shards = Shards(tmp_path)
    for i in (0, 1, 2, 0, 5, 3, 0):
        assert shards.read(i) == samples(6)[i]
        assert len(shards._open) <= 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_every_sample_once_window_by_window(sizes, window, seed, epoch):
    order = epoch_order(sizes, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(order, epoch_order(sizes, seed, epoch, window))
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    seen, at = set(), 0
    while at < len(order):  # a window holds whole shards, none of them seen before
        inside, end = set(), at
        while len(inside) < min(window, len(sizes) - len(seen)) or end - at < sum(sizes[s] for s in inside):
            inside.add(int(shard[end]))
            end += 1
        assert len(inside) <= window
        assert not inside & seen
        seen, at = seen | inside, end


def test_epochs_and_seeds_differ():
    orders = [epoch_order([10] * 10, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_shards_are_shuffled_too():
    first = {int(epoch_order([10] * 10, 0, epoch, window=1)[0]) // 10 for epoch in range(40)}
    assert len(first) > 5
