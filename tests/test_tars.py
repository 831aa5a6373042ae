"""Tars of others: from paths, pipes and URLs they read like packed ones; what is odd in them is left out and said."""

import functools
import gzip
import http.server
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from xvlm.data import check, shards, tars, writing
from xvlm.data.cache import Cache
from xvlm.data.records import Record
from xvlm.data.shards import BrokenSample, Shards
from xvlm.hub import sha256


def encoded(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 0, 255)).save(file, "PNG")
    return file.getvalue()


def record(i: int) -> Record:
    return Record(id=f"r{i}", source="made", width=8, height=6, captions=["a", "b"])


def write_tar(path: Path, numbers: range) -> Path:
    """As webdataset's own writer does it, record by record."""
    with webdataset.TarWriter(str(path)) as writer:
        for i in numbers:
            sample = {"png": encoded(i), "json": record(i).model_dump_json(exclude_defaults=True).encode()}
            writer.write({"__key__": f"r{i}"} | sample)
    return path


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three tars, 3 + 1 + 2 records."""
    (tmp_path / "tars").mkdir()
    for n, numbers in enumerate((range(3), range(3, 4), range(4, 6))):
        write_tar(tmp_path / f"tars/{n:03d}.tar", numbers)
    return tmp_path / "tars"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where the default cache is
    return Cache(folder=tmp_path / "cache")


def read(entry: str, cache: Cache) -> list[tuple[Record, bytes]]:
    found = Shards(tars.locate(entry, cache), cache)
    return [found.read(i) for i in range(len(found))]


EXPECTED = [(record(i), encoded(i)) for i in range(6)]


@pytest.mark.parametrize("entry", ["{}/*.tar", "{}/{{000..002}}.tar", "pipe:cat {}/{{000..002}}.tar"])
def test_paths_and_pipes_read_like_packed_ones(folder, cache, entry):
    assert read(entry.format(folder), cache) == EXPECTED
    (index,) = (cache.folder / "indexes").glob("*/*")
    assert index.name == "index.json"


@pytest.mark.skipif(shutil.which("curl") is None, reason="URLs are opened with curl, which is not installed")
def test_urls_read_like_packed_ones(folder, cache):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []

        def log_message(self, *_):
            self.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert read(f"{address}/{{000..002}}.tar", cache) == EXPECTED
    assert read(f"{address}/{{000..002}}.tar", cache) == EXPECTED
    assert sorted(Quiet.asked) == ["/000.tar", "/001.tar", "/002.tar"]  # once
    with pytest.raises(OSError, match=rf"{address}/absent\.tar: cannot be fetched"):
        tars.locate(f"{address}/absent.tar", cache)
    server.shutdown()
    server.server_close()


def test_a_file_that_is_called_like_a_command_is_a_file(folder, cache, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "000.tar").rename(folder / "pipe:touch ran; cat 001.tar")
    assert read("pipe:touch ran; cat 001.tar", cache) == EXPECTED[:3]
    assert tars.expand(["pipe:touch ran; cat 001.tar"]) == [str(folder / "pipe:touch ran; cat 001.tar")]
    assert not (folder / "ran").exists()
    assert tars.expand([f"pipe:cat {'x' * 300}.tar"]) == [f"pipe:cat {'x' * 300}.tar"]


def test_a_packed_folder_is_its_own(folder, cache, tmp_path):
    writing.write_shards(EXPECTED, tmp_path / "packed", progress=False)
    assert tars.locate(str(tmp_path / "packed"), cache) == tmp_path / "packed"
    with pytest.raises(FileNotFoundError, match=r"absent/\*\.tar: no such file"):
        tars.locate(f"{tmp_path}/absent/*.tar", cache)


def test_an_index_beside_its_tars_moves_with_them(folder, cache, tmp_path):
    index = tars.write_index(tars.expand([f"{folder}/*.tar"]), folder, cache, progress=False)
    assert [shard.file for shard in index.shards] == ["000.tar", "001.tar", "002.tar"]
    assert index.counts == {"records": 6}
    moved = Shards(folder.rename(tmp_path / "moved"))
    assert [moved.read(i) for i in range(6)] == EXPECTED
    with pytest.raises(FileExistsError, match="has an index already"):
        tars.write_index([str(tmp_path / "moved/000.tar")], tmp_path / "moved", cache, progress=False)


def leading_to(folder: Path, file: str) -> Path:
    """A folder that somebody else packed, whose index leads to this."""
    writing.write_shards(EXPECTED, folder, progress=False)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["file"] = file
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("scheme", ["pipe:", "PIPE:", " pipe:", "file:"])
def test_commands_of_a_folder_from_elsewhere_are_not_run(tmp_path, cache, scheme):
    found = leading_to(tmp_path / "theirs", f"{scheme}touch {tmp_path}/ran # ://")
    with pytest.raises(PermissionError, match=r"touch .*: an index leads to this, .*xvlm data index"):
        Shards(found, cache)
    (problem,) = check.check(check.packed(found, cache)).problems
    assert "commands in files are not run" in problem.message
    assert not (tmp_path / "ran").exists()


def test_commands_that_were_given_here_are_run_for_an_index_anywhere(folder, cache, tmp_path):
    places = [f"pipe:cat {folder}/{n:03d}.tar" for n in range(3)]
    tars.write_index(places, tmp_path / "index", cache, progress=False)
    shutil.rmtree(cache.root / "files")
    found = Shards(tmp_path / "index", cache)
    assert [found.read(i) for i in range(6)] == EXPECTED
    other = Cache(folder=tmp_path / "another")
    for elsewhere in (other, Cache()):
        assert Shards(tmp_path / "index", elsewhere).read(0) == EXPECTED[0]
    shutil.rmtree(Cache().root / "trusted")
    with pytest.raises(PermissionError):
        Shards(tmp_path / "index", other)
    tars.locate(places[0], other)
    shutil.rmtree(other.root / "trusted")  # as of an index that an earlier version made
    assert Shards(tars.locate(places[0], other), other).read(0) == EXPECTED[0]


@pytest.mark.parametrize(("digest", "problems"), [("right", []), ("0" * 64, ["not the bytes that were packed"])])
def test_the_bytes_of_tars_elsewhere_are_checked_too(folder, cache, tmp_path, digest, problems):
    place = f"pipe:cat {folder}/000.tar"
    tars.write_index([place], tmp_path / "index", cache, progress=False)
    index = json.loads((tmp_path / "index/index.json").read_text())
    index["shards"][0]["sha256"] = sha256(folder / "000.tar") if digest == "right" else digest
    (tmp_path / "index/index.json").write_text(json.dumps(index))
    report = check.check(check.packed(tmp_path / "index", cache), ignore={"image-mode"})
    assert [problem.message for problem in report.problems if problem.kind == "shard"] == problems
    assert report.records == len(index["shards"][0]["samples"])


def test_files_that_an_index_leads_to_are_tars(tmp_path, cache):
    (tmp_path / "secret").write_bytes(b"a word that is nobody's business")
    with pytest.raises(ValueError, match=r"index\.json: shards\.0\.file: .*secret: expected a file .* ends in \.tar"):
        Shards(leading_to(tmp_path / "theirs", str(tmp_path / "secret")), cache)
    with pytest.raises(ValueError, match=r"secret: expected a file .* ends in \.tar"):
        tars.expand([f"{tmp_path}/secre*"])
    os.mkfifo(tmp_path / "waits.tar")
    with pytest.raises(FileNotFoundError, match=r"waits\.tar"):
        Shards(leading_to(tmp_path / "others", str(tmp_path / "waits.tar")), cache)
    with pytest.raises(FileNotFoundError, match=r"waits\.tar: no such file"):
        cache.open(str(tmp_path / "waits.tar"))


def test_captions_are_read_as_records(tmp_path, cache):
    """The layout of img2dataset: a .txt with the caption, and a .json about the download that is no record."""
    (tmp_path / "cc3m").mkdir()
    about = json.dumps({"url": "u", "status": "success"}).encode()
    members = {"00/7.jpg": encoded(7), "00/7.txt": " ein Hund, größer\n".encode(), "00/7.json": about}
    members |= {"00/8.jpg": encoded(8), "00/8.txt": b"\xff", "00/9.JPG": b"no image", "00/9.txt": b"a cat"}
    members |= {"00/10.png": encoded(10), "00/10.txt": b"  "}
    found = Shards(tars.locate(str(tar_of(tmp_path / "cc3m/0.tar", members)), cache), cache)
    caption = Record(id="7", source="cc3m", width=8, height=6, captions=["ein Hund, größer"])
    assert found.read(0) == (caption, encoded(7))
    for i, reason in enumerate(("00/8: 'utf-8'", "00/9: image cannot be decoded", "00/10: the caption is empty"), 1):
        with pytest.raises(BrokenSample, match=rf"cc3m/0\.tar/{reason}"):
            found.read(i)


@pytest.mark.parametrize("entry", ["{}/cc3m/0.tar", "pipe:cat {}/cc3m/0.tar"])
def test_tars_of_captions_are_checked(tmp_path, cache, entry):
    (tmp_path / "cc3m").mkdir()
    members = {"7.png": encoded(7), "7.txt": b"a dog", "x/8.png": encoded(8), "x/8.txt": b"n01440764"}
    members |= {"9.png": encoded(9)[:20], "9.txt": b"a dog", "10.png": encoded(10), "10.txt": b" "}
    tar_of(tmp_path / "cc3m/0.tar", members)
    report = check.check(check.packed(tars.locate(entry.format(tmp_path), cache), cache))
    found = {(problem.record, problem.kind) for problem in report.problems}
    assert found == {("8", "text-is-id"), ("9", "record"), ("10", "record")}
    assert report.records == 2


def test_a_tar_that_cannot_be_fetched_is_a_problem_of_the_check(folder, cache, monkeypatch):
    found = tars.locate(f"pipe:cat {folder}/000.tar", cache)
    shutil.rmtree(cache.root / "files")
    (folder / "000.tar").unlink()
    (problem,) = check.check(check.packed(found, cache)).problems
    assert (problem.kind, problem.where) == ("shard", f"pipe:cat {folder}/000.tar")
    assert "cannot be fetched" in problem.message


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", 0
    return info


def test_hostile_and_odd_members_do_no_harm(tmp_path, cache, caplog):
    document = record(1).model_dump_json().encode()
    members = {"../r1.png": encoded(1), "../r1.json": document}  # a name is only a name
    members |= {"/r2.png": encoded(2), "/r2.json": link("/r2.json", tarfile.SYMTYPE)}
    members |= {"r3.png": encoded(3), "r3.json": link("r3.json", tarfile.LNKTYPE)}
    members |= {"r4.png": link("r4.png", tarfile.FIFOTYPE), "r4.json": document}
    members |= {"noise": b"x", ".hidden.png": encoded(5), "r6.cls": b"3", "r7.png": encoded(7)}
    path = tar_of(tmp_path / "odd.tar", members)
    assert read(str(path), cache) == [(record(1), encoded(1))]
    assert "odd.tar: 1 of 6 samples have an image and a .json" in caplog.text
    assert {file.name for file in tmp_path.iterdir()} == {"odd.tar", "cache"}


def test_a_compressed_tar_is_not_unpacked(tmp_path, cache):
    path = tar_of(tmp_path / "plain.tar", {"r1.png": encoded(1), "r1.json": b" " * 10**7})
    (tmp_path / "bomb.tar").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"bomb\.tar: no tar holds an image"):
        tars.locate(str(tmp_path / "bomb.tar"), cache)


def test_a_member_that_claims_to_be_huge_is_left_out(tmp_path, cache):
    path = write_tar(tmp_path / "a.tar", range(2))
    huge = tarfile.TarInfo("r9.png")
    huge.size = 1 << 40
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + huge.tobuf())
    assert read(str(path), cache) == EXPECTED[:2]


def test_a_tar_that_is_cut_gives_what_is_there(folder, cache, caplog):
    with tarfile.open(folder / "002.tar") as tar:
        last = tar.getmembers()[-1]
    with (folder / "002.tar").open("r+b") as file:
        file.truncate(last.offset_data + 10)
    assert read(f"{folder}/*.tar", cache) == EXPECTED[:5]
    assert "002.tar: 1 of " in caplog.text


def test_tars_without_samples_are_refused(tmp_path, cache, caplog):
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"packed\.tar: no tar holds an image with a \.txt or \.json"):
        tars.locate(f"{tmp_path}/packed.tar", cache)
    assert "cannot be read to its end" in caplog.text


def counted(path: Path, more: str = "") -> str:
    """A pipe that notes each time it is opened."""
    return f"pipe:echo {path.name} >> {path.parent}/opened; {more}cat {path}"


def opened(folder: Path) -> list[str]:
    return sorted((folder / "opened").read_text().split()) if (folder / "opened").exists() else []


def test_indexing_that_was_cut_short_goes_on(folder, cache, tmp_path):
    places = [counted(folder / f"{n:03d}.tar") for n in range(3)]
    kept = (folder / "002.tar").rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"002\.tar: cannot be fetched"):
        tars.write_index(places, tmp_path / "index", cache, progress=False)
    assert opened(folder) == ["000.tar", "001.tar", "002.tar", "002.tar", "002.tar"]  # three tries
    kept.rename(folder / "002.tar")
    tars.write_index(places, tmp_path / "index", Cache(folder=tmp_path / "other"), progress=False)
    assert opened(folder) == ["000.tar", "001.tar", *["002.tar"] * 4]
    assert [file.name for file in (tmp_path / "index").iterdir()] == ["index.json"]


def test_processes_fetch_a_shard_once(folder, cache):
    place = counted(folder / "000.tar", "sleep 0.3; ")
    cache.trust([place])
    with multiprocessing.get_context("fork").Pool(3) as pool:
        contents = pool.map(functools.partial(fetched, cache), [place] * 3, chunksize=1)
    assert contents == [(folder / "000.tar").read_bytes()] * 3
    assert opened(folder) == ["000.tar"]


def fetched(cache: Cache, place: str) -> bytes:
    with cache.open(place) as file:
        return file.read()


def test_the_cache_keeps_to_its_limit_and_lets_go_of_what_is_oldest(folder, tmp_path):
    size = (folder / "000.tar").stat().st_size
    places = []
    for n in range(4):
        shutil.copy(folder / "000.tar", folder / f"copy{n}.tar")
        places.append(counted(folder / f"copy{n}.tar"))
    cache = Cache(folder=tmp_path / "small", gigabytes=2.5 * size / 1e9)
    cache.trust(places)
    first = cache.open(places[0])
    for n in (1, 0, 2, 0, 3):
        fetched(cache, places[n])
    assert opened(folder) == [f"copy{n}.tar" for n in range(4)]
    assert sum(file.stat().st_size for file in (cache.folder / "files").glob("[!.]*")) == 2 * size
    fetched(cache, places[1])
    assert opened(folder).count("copy1.tar") == 2  # it had to go
    assert len(first.read()) == size  # whoever has it open can read on
    fetched(cache.model_copy(update={"gigabytes": size / 2e9}), places[2])  # one is kept in any case
    assert len(list((cache.folder / "files").glob("[!.]*"))) == 1


def test_a_shard_that_cannot_be_fetched_is_broken_samples_for_a_while(folder, cache, monkeypatch):
    entry = counted(folder / "000.tar")
    found = Shards(tars.locate(entry, cache), cache)
    shutil.rmtree(cache.folder / "files")
    (folder / "000.tar").rename(folder / "away.tar")
    for i in range(3):
        with pytest.raises(BrokenSample, match=rf"r{i}: the shard cannot be read.*000\.tar: cannot be fetched"):
            found.read(i)
    assert len(opened(folder)) == 1 + 3  # three tries, for the first sample
    (folder / "away.tar").rename(folder / "000.tar")
    with pytest.raises(BrokenSample):
        found.read(0)
    monkeypatch.setattr(shards, "AGAIN_AFTER", 0.0)
    assert found.read(0) == EXPECTED[0]


def test_a_tar_that_was_replaced_is_noticed(folder, cache):
    found = Shards(tars.locate(f"{folder}/001.tar", cache), cache)
    write_tar(folder / "001.tar", range(20, 40))
    with pytest.raises(BrokenSample, match=r"it has \d+ bytes, the index in .*indexes.* says \d+"):
        found.read(0)
