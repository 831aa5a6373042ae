"""From a reader to shards: any number of workers, interruptions, images that are broken, too large, or held out."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from photographs import place
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from xvlm.data import pack as packing
from xvlm.data.cache import alone
from xvlm.data.pack import CorpusConfig, pack
from xvlm.data.parallel import AHEAD, ordered_map
from xvlm.data.records import RLE, Expression, Object, Phrase, Record, Region, Statement
from xvlm.data.shards import REMARKS, Shards, read_remarks
from xvlm.data.writing import JOURNAL, write_shards

BLUE, WHITE = (0, 0, 255), (255, 255, 255)


def square(i: int) -> int:
    return 8 + 4 * i


def picture(i: int, kind: str = "JPEG") -> bytes:
    """A blue square on white, elsewhere in each."""
    image = Image.new("RGB", (120, 80), WHITE)
    ImageDraw.Draw(image).rectangle((square(i), 20, square(i) + 31, 51), BLUE)
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    return file.getvalue()


def sample(i: int, **more) -> tuple[Record, bytes]:
    box = (float(square(i)), 20.0, float(square(i) + 32), 52.0)
    fields = {"id": f"r{i}", "source": "made", "width": 120, "height": 80, "captions": ["a square"]}
    return Record(**fields | {"objects": [Object(box_xyxy=box, label="square")]} | more), picture(i)


@pytest.fixture
def source(monkeypatch):
    """What the reader reads, to be changed by the test; a member that is an error is raised."""
    samples = [sample(i) for i in range(12)]

    def read(config, split, limit, absent):
        for one in samples[:limit]:
            if isinstance(one, BaseException):
                raise one
            yield one

    monkeypatch.setattr(packing, "read", read)
    return samples


def config(out: Path, **more) -> CorpusConfig:
    return CorpusConfig.model_validate({"reader": "coco", "out": out, "splits": {"train": None}} | more)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_photographs_that_exif_turns_although_they_have_boxes_are_told(tmp_path, source):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (120, 80)).save(file, "JPEG", exif=exif)
    source[:] = [sample(0), (sample(1)[0], file.getvalue()), (sample(2, objects=[])[0], file.getvalue())]
    assert len(pack(config(tmp_path))["train"]) == 3
    told = read_remarks(tmp_path / "train")
    assert [(remark.record, remark.why, remark.packed) for remark in told] == [("r1", "rotated", True)]


# ---------------------------------------------------------------------------------------------------------------------
# Workers and interruptions


def test_any_number_of_workers_packs_the_same_bytes(source, tmp_path):
    source[3] = source[3][0], source[3][1][:-100]
    packed = [
        pack(config(tmp_path / str(workers), workers=workers, max_side=60, allow_broken=True))["train"]
        for workers in (0, 2)
    ]
    assert len(packed[0]) == 11
    assert contents(tmp_path / "0/train") == contents(tmp_path / "2/train")


def times_ten(i: int) -> int:
    if i == 13:
        raise ValueError("unlucky")
    return 10 * i


def end_this_process(i: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_little_is_read_ahead():
    drawn = []
    results = ordered_map(times_ten, (drawn.append(i) or i for i in range(1000) if i != 13), 2)
    assert [next(results) for _ in range(100)] == [10 * i for i in range(101) if i != 13]
    assert len(drawn) <= 100 + AHEAD * 2
    results.close()


def test_errors_of_workers_arrive_in_their_place():
    results = ordered_map(times_ten, range(20), 2)
    assert [next(results) for _ in range(13)] == [10 * i for i in range(13)]
    with pytest.raises(ValueError, match="unlucky"):
        next(results)
    with pytest.raises(OSError, match="ended from outside"):
        list(ordered_map(end_this_process, range(3), 1))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "mapping.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(packing.__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "mapping.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.communicate()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {worker} is still there")


PARENT = """
import itertools, os, time
from xvlm.data.parallel import ordered_map

def process(i):
    return os.getpid()

if __name__ == "__main__":
    results = ordered_map(process, itertools.count(), 1)
    print(next(results), flush=True)
    time.sleep(60)
"""


class Stop(Exception):
    pass


def prepared_records(monkeypatch) -> list[str]:
    """Ids that went through the preparation from now on."""
    seen = []
    original = packing.Preparation.__call__
    monkeypatch.setattr(
        packing.Preparation,
        "__call__",
        lambda self, record, image: seen.append(record.id) or original(self, record, image),
    )
    return seen


@pytest.fixture
def small_shards(monkeypatch):
    def in_threes(*args, **options):
        return write_shards(*args, **options, samples_per_shard=3)

    monkeypatch.setattr(packing, "write_shards", in_threes)


def interrupt(source: list, at: int, config: CorpusConfig) -> None:
    kept, source[at] = source[at], Stop()
    with pytest.raises(Stop):
        pack(config)
    source[at] = kept


def test_interrupted_packing_goes_on_after_the_last_whole_shard(source, small_shards, tmp_path, monkeypatch):
    source[1] = source[1][0], source[1][1][:-100]
    options = {"max_side": 60, "allow_broken": True}
    pack(config(tmp_path / "whole", **options))
    interrupt(source, 8, config(tmp_path / "cut", **options))
    folder = tmp_path / "cut/train"
    assert sorted(file.name for file in folder.iterdir()) == ["000000.tar", "000001.tar", JOURNAL]
    for name in (".000002.tar.0123abcd.unfinished", ".index.json.0123abcd.unfinished"):  # as after a SIGKILL
        (folder / name).write_bytes(b"half")
    before = (folder / "000000.tar").stat().st_mtime_ns
    seen = prepared_records(monkeypatch)
    pack(config(tmp_path / "cut", **options))
    assert seen == [f"r{i}" for i in range(7, 12)]  # two shards of three, and one record that was left out
    assert (folder / "000000.tar").stat().st_mtime_ns == before
    assert contents(folder) == contents(tmp_path / "whole/train")


@pytest.mark.parametrize("change", ["options", "source", "shard", "journal"])
def test_what_is_not_of_this_packing_is_packed_again(change, source, small_shards, tmp_path, monkeypatch):
    interrupt(source, 8, config(tmp_path / "cut", max_side=60))
    options, again_from = {"max_side": 60}, 3
    folder = tmp_path / "cut/train"
    if change == "options":
        options, again_from = {"max_side": 61}, 0
    elif change == "source":
        source[4] = sample(4, captions=["another caption"])
    elif change == "shard":
        with (folder / "000001.tar").open("r+b") as file:
            file.write(b"?")
    else:
        (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes()[:-40])  # the last line was not finished
    seen = prepared_records(monkeypatch)
    pack(config(tmp_path / "cut", **options))
    assert seen == [f"r{i}" for i in range(again_from, 12)]
    pack(config(tmp_path / "whole", **options))
    assert contents(folder) == contents(tmp_path / "whole/train")


def test_a_shard_that_does_not_read_back_never_gets_its_name(tmp_path, monkeypatch):
    from webdataset.writer import TarWriter

    write = TarWriter.write

    def spoilt(self, member):
        return write(self, member | {"jpg": member["jpg"][:-1] + b"?"})

    monkeypatch.setattr(TarWriter, "write", spoilt)
    with pytest.raises(OSError, match=r"000000\.tar: record 'r0' does not read back"):
        write_shards([sample(0)], tmp_path, progress=False)
    assert not list(tmp_path.glob("0*"))


def test_a_folder_is_packed_by_one_process_at_a_time(tmp_path):
    def beside():
        yield sample(0)
        with pytest.raises(FileExistsError, match="another process is packing into this folder"):
            write_shards([sample(7)], tmp_path, progress=False)
        yield sample(1)

    assert write_shards(beside(), tmp_path, progress=False).counts["records"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "index.json"]
    with pytest.raises(FileExistsError, match="packed already"):
        write_shards([sample(7)], tmp_path, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "index.json"]


def test_a_folder_that_another_process_finishes_meanwhile_is_packed_already(tmp_path, monkeypatch):
    def finished_first(*_):
        (tmp_path / JOURNAL).unlink()
        (tmp_path / "index.json").write_text("{}")

    monkeypatch.setattr("fcntl.flock", finished_first)
    with pytest.raises(FileExistsError, match="packed already"):
        write_shards([sample(0)], tmp_path, progress=False)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=rf"{tmp_path}: files cannot be locked .*; choose a folder on another"):
        write_shards([sample(0)], tmp_path, progress=False)
    with pytest.raises(OSError, match=rf"{tmp_path}: files cannot be locked"), alone(tmp_path / "a.tar"):
        pass


def test_notes_on_an_earlier_packing_do_not_stay(source, tmp_path):
    notes = [tmp_path / "train" / name for name in (REMARKS, packing.FINGERPRINT)]
    notes[0].parent.mkdir()
    for note in notes:
        note.write_text("old")
    pack(config(tmp_path))
    assert not any(note.exists() for note in notes)


def test_large_images_make_shards_of_fewer_samples_that_are_on_disk_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("xvlm.data.writing.BYTES_PER_SHARD", 250_000)
    on_disk = []

    def large():
        for i in range(5):
            on_disk.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield sample(i)[0], b"\xff\xd8\xff" + bytes(100_000)

    write_shards(large(), tmp_path, progress=False)
    assert Shards(tmp_path).sizes == [3, 2]
    assert on_disk[2] > 150_000  # before the shard is full


# ---------------------------------------------------------------------------------------------------------------------
# A source that changes


@pytest.fixture
def table(tmp_path):
    """A table of two photographs, of which one is absent."""
    place(tmp_path / "mine", "a.jpg")
    (tmp_path / "mine/train.csv").write_text("image,text\na.jpg,a dog\nb.jpg,a cat\n")
    return config(tmp_path / "mine/packed", reader="csv_table", folder=tmp_path / "mine", allow_missing=True)


def test_what_is_packed_already_is_left_as_it_is_and_no_photograph_is_read(table, monkeypatch):
    pack(table)
    before = contents(table.out / "train")
    monkeypatch.setattr(packing, "read", lambda *_: pytest.fail("the source was read"))
    pack(table)
    assert contents(table.out / "train") == before


@pytest.mark.parametrize("change", ["annotations", "an absent image"])
def test_a_source_that_changed_is_not_taken_for_packed(table, change):
    pack(table)
    if change == "annotations":
        text = (table.folder / "train.csv").read_text()
        (table.folder / "train.csv").write_text(text.replace("dog", "cow"))
    else:
        place(table.folder, "b.jpg")
    with pytest.raises(
        ValueError, match=r"packed/train: the source has changed .*; remove that folder .*, or choose another"
    ):
        pack(table)
    shutil.rmtree(table.out)
    record, _ = pack(table)["train"].read(0 if change == "annotations" else 1)
    assert record.captions + [text for region in record.regions for text in region.descriptions] == [
        "a cow" if change == "annotations" else "a cat"
    ]


def test_a_source_with_new_times_or_other_files_beside_it_is_compared_once(table, monkeypatch):
    pack(table)
    before = contents(table.out / "train")
    os.utime(table.folder / "train.csv", (0, 0))
    (table.folder / "val.csv").write_text("image,text\na.jpg,a dog\n")
    pack(table)
    monkeypatch.setattr(packing, "read", lambda *_: pytest.fail("the source was read again"))
    pack(table)
    after = contents(table.out / "train")
    assert before.pop(packing.FINGERPRINT) != after.pop(packing.FINGERPRINT) and before == after


def test_a_source_that_changed_while_it_was_packed_is_compared_the_next_time(table, monkeypatch):
    original = packing.write_shards

    def edited_meanwhile(*arguments, **options):
        original(*arguments, **options)
        (table.folder / "train.csv").write_text("image,text\na.jpg,a cow\n")

    monkeypatch.setattr(packing, "write_shards", edited_meanwhile)
    pack(table)
    with pytest.raises(ValueError, match="the source has changed"):
        pack(table)


def test_shards_outlive_their_source(tmp_path, table):
    table = table.model_copy(update={"out": tmp_path / "elsewhere"})
    pack(table)
    shutil.rmtree(table.folder)
    assert len(pack(table)["train"]) == 1


def test_shards_of_earlier_versions_are_taken_as_they_are(table):
    pack(table)
    folder = table.out / "train"
    index = json.loads((folder / "index.json").read_text())
    del index["source"], index["description"]["allow_missing"]
    (folder / "index.json").write_text(json.dumps(index))
    (folder / packing.FINGERPRINT).unlink()
    assert len(pack(table)["train"]) == 1


@pytest.mark.parametrize("option", ["allow_broken", "allow_missing"])
def test_what_was_packed_leniently_is_not_the_strict_set(option, source, small_shards, tmp_path):
    source[1] = source[1][0], source[1][1][:-100]
    lenient, strict = {"allow_broken": True, option: True}, {"allow_broken": True, option: False}
    interrupt(source, 8, config(tmp_path, **lenient))
    if option == "allow_broken":
        with pytest.raises(ValueError, match="'r1': image cannot be decoded"):
            pack(config(tmp_path, **strict))
    pack(config(tmp_path, **lenient))
    with pytest.raises(ValueError, match=rf"something else \({option} was True, is None\)"):
        pack(config(tmp_path, **strict))


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_without_a_wish_images_keep_their_bytes(source, tmp_path):
    packed = pack(config(tmp_path))["train"]
    assert [packed.read(i) for i in range(12)] == source
    assert not (tmp_path / "train" / REMARKS).exists()


def test_a_truncated_image_stops_packing_or_is_left_out_and_listed(source, tmp_path):
    source[5] = source[5][0], source[5][1][:-100]
    with pytest.raises(ValueError, match=r"made record 'r5': image cannot be decoded.*truncated.*allow_broken"):
        pack(config(tmp_path / "strict"))
    packed = pack(config(tmp_path / "lenient", allow_broken=True))["train"]
    assert [packed.key(i) for i in range(len(packed))] == [f"r{i}" for i in range(12) if i != 5]
    (remark,) = read_remarks(tmp_path / "lenient/train")
    assert (remark.record, remark.why, remark.packed) == ("r5", "unreadable", False)
    assert "truncated" in remark.message


def test_absent_images_are_listed_by_name(tmp_path):
    place(tmp_path, "a.jpg", "c.jpg")
    (tmp_path / "train.csv").write_text("image,text\na.jpg,a dog\nb.jpg,a cat\nc.jpg,a cow\nd.jpg,a fly\n")
    source = {"reader": "csv_table", "folder": tmp_path}
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: no such photograph"):
        pack(config(tmp_path / "strict", **source))
    pack(config(tmp_path / "lenient", **source, allow_missing=True))
    found = [(remark.record, remark.why, remark.packed) for remark in read_remarks(tmp_path / "lenient/train")]
    assert found == [("b.jpg", "absent", False), ("d.jpg", "absent", False)]


@pytest.mark.parametrize("masks", [False, True])
def test_masks_of_coco_are_packed_where_they_are_asked_for(tmp_path, masks):
    place(tmp_path, "images/a.jpg")
    outline = [[10.0, 20.0, 40.0, 20.0, 40.0, 60.0, 10.0, 60.0]]
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "segmentation": outline}
    photograph = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}
    (tmp_path / "annotations").mkdir()
    file = {"images": [photograph], "annotations": [thing], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(file))
    packed = pack(config(tmp_path / "out", folder=tmp_path, masks=masks))["train"]
    mask = packed.read(0)[0].objects[0].mask
    if not masks:
        assert mask is None
        with pytest.raises(ValueError, match="was packed from"):
            pack(config(tmp_path / "out", folder=tmp_path, masks=True))
        return
    expected = np.zeros((80, 100), dtype=np.uint8)
    expected[20:60, 10:40] = 1
    assert np.array_equal(coco_mask.decode(mask.model_dump()), expected)
    with pytest.raises(ValueError, match="masks: a choice of the readers coco and coco_json, not"):
        config(tmp_path, reader="scenes", masks=True)


def test_a_record_of_another_size_than_its_image_stops_packing(source, tmp_path):
    source[5] = sample(5, width=121)
    with pytest.raises(ValueError, match="'r5': the image is 120x80, the record says 121x80"):
        pack(config(tmp_path, allow_broken=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_boxes_and_masks_follow_an_image_that_is_made_smaller(kind, source, tmp_path):
    pixels = np.zeros((80, 120), dtype=np.uint8)
    pixels[20:52, 20:52] = 1
    encoded = coco_mask.encode(np.asfortranarray(pixels))
    mask = RLE(size=(80, 120), counts=encoded["counts"].decode())
    box = (20.0, 20.0, 52.0, 52.0)
    record, _ = sample(
        3,
        regions=[Region(box_xyxy=box, descriptions=["it"], mask=mask)],
        expressions=[Expression(text="it", box_xyxy=box), Expression(text="nothing")],
        phrases=[Phrase(caption=0, start=0, end=8, boxes_xyxy=[box, (0.0, 0.0, 120.0, 80.0)])],
    )
    source[:] = [(record, picture(3, kind))]
    made, data = pack(config(tmp_path, max_side=50))["train"].read(0)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (kind, (50, 33))
    assert (made.width, made.height) == (50, 33)
    smaller = (20 * 50 / 120, 20 * 33 / 80, 52 * 50 / 120, 52 * 33 / 80)
    assert made.objects[0].box_xyxy == pytest.approx(smaller)
    assert made.regions[0].box_xyxy == made.expressions[0].box_xyxy == made.phrases[0].boxes_xyxy[0]
    assert made.phrases[0].boxes_xyxy[1] == (0, 0, 50, 33)
    assert made.expressions[1].box_xyxy is None
    drawn = np.asarray(image.convert("RGB"))[..., 0] < 128
    ys, xs = np.nonzero(drawn)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == pytest.approx(smaller, abs=1)
    decoded = coco_mask.decode({"size": list(made.regions[0].mask.size), "counts": made.regions[0].mask.counts})
    red = np.asarray(image.convert("RGB"))[..., 0]
    assert decoded[red < 60].all()  # what is partly blue may be in or out
    assert not decoded[red > 195].any()


def test_small_images_are_not_written_anew(source, tmp_path):
    packed = pack(config(tmp_path, max_side=120))["train"]
    assert packed.read(0) == source[0]


def pairs(n: int, broken: int) -> list[tuple[Record, bytes]]:
    """Right images and their left ones with two statements, as NLVR2 is read; the picture ``broken`` is cut short."""
    made = []
    for i in range(n):
        said = [
            Statement(text="both are blue", other=f"r{2 * i}", label=True),
            Statement(text="x", other="r0", label=False),
        ]
        made += [sample(2 * i), sample(2 * i + 1, statements=said)]
    record, image = made[broken]
    made[broken] = record, image[:-100]
    return made


@pytest.mark.parametrize("cut", [None, 8])
def test_a_statement_goes_with_its_other_image_and_is_counted(cut, source, small_shards, tmp_path):
    source[:] = pairs(6, broken=2)
    if cut is not None:
        interrupt(source, cut, config(tmp_path, allow_broken=True))
    packed = pack(config(tmp_path, allow_broken=True))["train"]
    records = list(packed.records())
    assert {each.other for record in records for each in record.statements} == {"r0", "r4", "r6", "r8", "r10"}
    unreadable, lost = read_remarks(tmp_path / "train")
    assert (unreadable.record, unreadable.why) == ("r2", "unreadable")
    assert (lost.record, lost.why, lost.packed) == ("r3", "statements", True)
    assert lost.message == "without 1 statement about images that were left out"
    assert packed.counts["statements"] == 11


def test_a_statement_far_behind_its_other_image_goes_too_when_packing_went_on(source, small_shards, tmp_path):
    source[:] = pairs(6, broken=0)
    interrupt(source, 10, config(tmp_path / "cut", allow_broken=True))
    pack(config(tmp_path / "cut", allow_broken=True))
    pack(config(tmp_path / "whole", allow_broken=True))
    assert contents(tmp_path / "cut/train") == contents(tmp_path / "whole/train")
    assert Shards(tmp_path / "cut/train").counts["statements"] == 5


@pytest.mark.parametrize("cut", [None, 5])
def test_statements_that_stay_although_their_other_image_does_not_come_are_counted(cut, source, small_shards, tmp_path):
    about = [Statement(text="x", other=other, label=True) for other in ("r1", "r6", "r7", "nowhere")]
    source[:] = [sample(0, statements=about), *(sample(i) for i in range(1, 8))]
    source[6] = source[6][0], source[6][1][:-100]
    if cut is not None:
        interrupt(source, cut, config(tmp_path, allow_broken=True))
    pack(config(tmp_path, allow_broken=True))
    unreadable, dangling = read_remarks(tmp_path / "train")
    assert (unreadable.record, dangling.record, dangling.why, dangling.packed) == ("r6", "r0", "statements", True)
    assert dangling.message == "with 2 statements about images that are not here"


# ---------------------------------------------------------------------------------------------------------------------
# Held-out images


@pytest.fixture
def held_out(tmp_path):
    """Packed: the picture of r2 under another name, and COCO's 7."""
    coco = Record(id="7", source="coco", width=120, height=80)
    other = sample(2, id="elsewhere", source="other")[0]
    write_shards([(other, picture(2, "PNG")), (coco, picture(20))], tmp_path / "held_out", progress=False)
    return tmp_path / "held_out"


def spread(i: int) -> bytes:
    noise = np.random.default_rng(i).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_images_are_dropped_and_counted(workers, source, held_out, tmp_path):
    source[:] = [(record, image if i == 2 else spread(i)) for i, (record, image) in enumerate(source)]
    source[4] = sample(4, same_as={"coco": "000000000007"})[0], spread(4)
    packed = pack(config(tmp_path / "out", avoid=[held_out], workers=workers))["train"]
    assert {packed.key(i) for i in range(len(packed))} == {f"r{i}" for i in range(12)} - {"r2", "r4"}
    looks, named = read_remarks(tmp_path / "out/train")
    assert (looks.record, looks.why, looks.packed) == ("r2", "leak", False)
    assert "looks like elsewhere of" in looks.message
    assert (named.record, named.why) == ("r4", "leak")
    assert "(coco:7)" in named.message


def test_when_nothing_is_left_the_reason_is_told(source, held_out, tmp_path):
    source[:] = [sample(2)]
    with pytest.raises(
        ValueError, match=r"no samples to pack; 1 were left out, the first because looks like elsewhere"
    ):
        pack(config(tmp_path / "out", avoid=[held_out]))


def test_evaluation_images_may_be_reported_only(source, held_out, tmp_path):
    source[:] = [(record, image if i == 2 else spread(i)) for i, (record, image) in enumerate(source)]
    packed = pack(config(tmp_path / "out", avoid=[held_out], leaks="report"))["train"]
    assert len(packed) == 12
    (remark,) = read_remarks(tmp_path / "out/train")
    assert (remark.record, remark.packed) == ("r2", True)


def test_a_leak_that_is_reported_hides_no_other_remark(source, held_out, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(2))).save(file, "JPEG", exif=exif)
    source[:] = [(sample(2)[0], file.getvalue())]
    pack(config(tmp_path / "out", avoid=[held_out], leaks="report"))
    assert [remark.why for remark in read_remarks(tmp_path / "out/train")] == ["rotated", "leak"]


def test_packed_without_a_guard_is_not_packed_with_one(source, held_out, tmp_path):
    pack(config(tmp_path / "out"))
    with pytest.raises(ValueError, match="was packed from"):
        pack(config(tmp_path / "out", avoid=[held_out]))
    described = json.loads((tmp_path / "out/train/index.json").read_text())["description"]
    assert described == {"reader": "coco", "split": "train", "limit": None, "folder": None}


def test_a_folder_packed_from_something_else_says_what_differs_and_no_more(tmp_path):
    asked = {"reader": "scenes", "out": tmp_path, "splits": {"train": 2}}
    pack(CorpusConfig(**asked, scenes={"size": 64}))
    with pytest.raises(ValueError) as raised:
        pack(CorpusConfig(**asked | {"splits": {"train": 3}}, scenes={"size": 96}, max_side=50))
    assert str(raised.value) == (
        f"{tmp_path / 'train'} was packed from something else (limit was 2, is 3, scenes.size was 64, is 96, max_side "
        "was None, is 50); remove that folder to pack it anew, or choose another folder"
    )


def test_a_file_that_was_edited_is_named(tmp_path):
    place(tmp_path, "a.jpg")
    table = tmp_path / "mine.csv"
    table.write_text("image,text\na.jpg,a dog\n")
    asked = config(tmp_path / "out", reader="csv_table", files={"train": table})
    pack(asked)
    table.write_text("image,text\na.jpg,a cat\n")
    with pytest.raises(ValueError) as raised:
        pack(asked)
    assert str(raised.value) == (
        f"{table} changed since {tmp_path / 'out/train'} was packed, or another file was; remove that folder "
        "to pack it anew, or choose another folder"
    )


def test_files_are_of_readers_of_own_files_and_train_has_one(tmp_path):
    asked = {"out": tmp_path, "splits": {"train": None}}
    with pytest.raises(ValueError, match=r"files: coco reads a folder; csv_table, coco_json, .*odvg read files"):
        CorpusConfig(reader="coco", files={"train": tmp_path / "a.json"}, **asked)
    with pytest.raises(ValueError, match="files: none for train"):
        CorpusConfig(reader="csv_table", files={"val": tmp_path / "a.csv"}, **asked)
    with pytest.raises(FileNotFoundError, match=r"a\.csv: no such file, for the split 'train'"):
        pack(CorpusConfig(reader="csv_table", files={"train": tmp_path / "a.csv"}, **asked))


def test_several_files_and_folders_of_images_are_one_split(tmp_path):
    place(tmp_path, "images/coco/val2014/a.jpg", "images/vg/b.jpg")
    captioned = [{"image": "val2014/a.jpg", "caption": "a dog"}]
    asked = [{"image": name, "question": "What is it?", "answer": "a dog"} for name in ("val2014/a.jpg", "b.jpg")]
    for name, rows in (("coco_train.json", captioned), ("vqa_train.json", asked)):
        (tmp_path / name).write_text(json.dumps(rows))
    corpus = {"reader": "albef_json", "files": {"train": [tmp_path / "coco_train.json", tmp_path / "vqa_train.json"]}}
    images = [tmp_path / "images/coco", tmp_path / "images/vg"]
    packed = pack(config(tmp_path / "out", **corpus, images=images))["train"]
    both, other = (packed.read(i)[0] for i in range(2))
    assert (both.id, both.captions, len(both.questions)) == ("val2014_a", ["a dog"], 1)
    assert (other.id, other.captions, len(other.questions)) == ("b", [], 1)
    with pytest.raises(ValueError, match="was packed from something else"):
        pack(config(tmp_path / "out", **corpus, images=images[:1]))
    with pytest.raises(FileNotFoundError, match="vgg: no such folder of photographs"):
        pack(config(tmp_path / "new", **corpus, images=tmp_path / "vgg"))


def test_an_image_that_comes_later_to_a_folder_of_images_is_a_change(tmp_path):
    place(tmp_path, "photos/a.jpg")
    (tmp_path / "t.csv").write_text("image,text\na.jpg,a dog\nb.jpg,a cat\n")
    corpus = {"reader": "csv_table", "files": {"train": tmp_path / "t.csv"}, "images": tmp_path / "photos"}
    asked = config(tmp_path / "out", **corpus, allow_missing=True)
    pack(asked)
    pack(asked)
    place(tmp_path, "photos/b.jpg")
    with pytest.raises(ValueError, match="the source has changed since this was packed"):
        pack(asked)


def test_an_image_that_comes_later_outside_of_the_folder_is_a_change(tmp_path):
    place(tmp_path, "mine/a.jpg")
    away = tmp_path / "away/b.jpg"
    (tmp_path / "mine/train.csv").write_text(f"image,text\na.jpg,a dog\n{away},a cat\n")
    asked = config(tmp_path / "out", reader="csv_table", folder=tmp_path / "mine", allow_missing=True)
    pack(asked)
    place(tmp_path, "away/b.jpg")
    with pytest.raises(ValueError, match="the source has changed since this was packed"):
        pack(asked)


def test_names_of_labels_beside_a_file_that_was_named_are_part_of_the_source(tmp_path, monkeypatch):
    place(tmp_path, "a.jpg")
    thing = {"bbox": [10, 10, 50, 50], "label": 0}
    line = {"filename": "a.jpg", "width": 100, "height": 80, "detection": {"instances": [thing]}}
    (tmp_path / "my.jsonl").write_text(json.dumps(line))
    (tmp_path / "label_map.json").write_text('{"0": "dog"}')
    asked = config(tmp_path / "out", reader="odvg", files={"train": tmp_path / "my.jsonl"})
    pack(asked)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "read", lambda *_: pytest.fail("the source was read"))
        pack(asked)
    (tmp_path / "label_map.json").write_text('{"0": "cat"}')
    with pytest.raises(ValueError, match="the source has changed since this was packed"):
        pack(asked)


def test_a_table_without_a_column_of_splits_is_one_split(tmp_path):
    place(tmp_path, *(f"{i}.jpg" for i in range(4)))
    table = tmp_path / "all.csv"
    table.write_text("".join(["image,text\n", *(f"{i}.jpg,a dog\n" for i in range(4))]))
    corpus = {"out": tmp_path / "out", "reader": "csv_table"}
    expected = r"all\.csv: all its rows would be .*; expected a column split"
    both = CorpusConfig(**corpus, files={"train": table, "val": table}, splits={"train": None, "val": None})
    with pytest.raises(ValueError, match=expected):
        pack(both)
    assert not both.out.exists()
    pack(CorpusConfig(**corpus, files={"train": table}, splits={"train": None}))
    with pytest.raises(ValueError, match=expected):
        pack(CorpusConfig(**corpus, files={"val": table}, splits={"val": None}))


def test_a_table_with_a_column_of_splits_is_held_out_from_within_train(tmp_path):
    place(tmp_path, *(f"{i}.jpg" for i in range(4)))
    rows = [f"{i}.jpg,a dog,{'test' if i == 3 else 'train'}\n" for i in range(4)]
    (tmp_path / "all.csv").write_text("".join(["image,text,split\n", *rows]))
    files = {split: tmp_path / "all.csv" for split in ("train", "test")}
    packed = pack(
        config(tmp_path / "out", reader="csv_table", files=files, splits=dict.fromkeys(("train", "val", "test")))
    )
    ids = {name: [(one.id, one.split) for one, _ in map(part.read, range(len(part)))] for name, part in packed.items()}
    assert ids == {"train": [("1", "train"), ("2", "train")], "val": [("0", "val")], "test": [("3", "test")]}
