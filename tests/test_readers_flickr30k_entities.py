"""Flickr30k Entities: files written as they are published, broken ones, and real ones if at hand."""

import shutil
import zipfile
from itertools import islice
from pathlib import Path

import pytest
from photographs import jpeg, real

from xvlm.data.readers import flickr30k_entities
from xvlm.data.readers.entries import listing
from xvlm.data.records import Phrase, Region

XML = """<annotation>
	<filename>36979.jpg</filename>
	<size>
		<width>500</width>
		<height>400</height>
		<depth>3</depth>
	</size>
	<object>
		<name>1</name>
		<bndbox>
			<xmin>1</xmin>
			<ymin>1</ymin>
			<xmax>100</xmax>
			<ymax>200</ymax>
		</bndbox>
	</object>
	<object>
		<name>1</name>
		<name>2</name>
		<bndbox>
			<xmin>251</xmin>
			<ymin>101</ymin>
			<xmax>500</xmax>
			<ymax>400</ymax>
		</bndbox>
	</object>
	<object>
		<name>2</name>
		<bndbox>
			<xmin>600</xmin>
			<ymin>101</ymin>
			<xmax>700</xmax>
			<ymax>400</ymax>
		</bndbox>
	</object>
	<object>
		<name>3</name>
		<scene>1</scene>
		<nobndbox>0</nobndbox>
	</object>
</annotation>
"""
SENTENCES = """[/EN#1/people Two men] stand near [/EN#2/vehicles/other a red car] .
[/EN#1/people two men] on [/EN#3/scene the street] .
Nothing is marked here .
[/EN#1/people Men] look at [/EN#0/notvisual the time] .
[/EN#9/other Somebody] waits [/EN#2/vehicles for a car]
"""


@pytest.fixture
def entities(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/36979_0a1b.jpg").write_bytes(jpeg(250, 100))
    (tmp_path / "test.txt").write_text("36979_0a1b\n")
    for kind, ending, text in (("Annotations", "xml", XML), ("Sentences", "txt", SENTENCES)):
        (tmp_path / kind).mkdir()
        (tmp_path / f"{kind}/36979.{ending}").write_text(text)
    return tmp_path


def test_entities_captions_phrases_and_regions(entities):
    ((record, image),) = flickr30k_entities.read(entities, "test")
    assert image == (entities / "images/36979_0a1b.jpg").read_bytes()
    assert (record.id, record.source, record.split) == ("36979_0a1b", "flickr30k_entities", "test")
    assert (record.width, record.height) == (250, 100)
    assert "non-commercial" in record.licence
    assert record.captions == [
        "Two men stand near a red car .",
        "two men on the street .",
        "Nothing is marked here .",
        "Men look at the time .",
        "Somebody waits for a car",
    ]
    # Half as wide and a quarter as high as the annotated photograph; the box of chain 2 outside it is dropped.
    left, right = (0.0, 0.0, 50.0, 50.0), (125.0, 25.0, 250.0, 100.0)
    said = [(record.captions[p.caption][p.start : p.end], p.boxes_xyxy) for p in record.phrases]
    assert said == [
        ("Two men", [left, right]),
        ("a red car", [right]),
        ("two men", [left, right]),
        ("the street", []),
        ("Men", [left, right]),
        ("the time", []),
        ("Somebody", []),
        ("for a car", [right]),
    ]
    assert record.phrases[1] == Phrase(caption=0, start=19, end=28, boxes_xyxy=[right])
    assert record.regions == [
        Region(box_xyxy=(0.0, 0.0, 250.0, 100.0), descriptions=["Two men", "Men"]),
        Region(box_xyxy=right, descriptions=["a red car", "for a car"]),
    ]


@pytest.mark.parametrize("name", ["flickr30k-images", "flickr30k_images"])
def test_photographs_lie_where_their_archives_put_them(entities, name):
    (entities / "images").rename(entities / name)
    assert len(list(flickr30k_entities.read(entities, "test"))) == 1


def test_entities_of_the_chain_of_unseen_things_are_no_region(entities):
    (entities / "Annotations/36979.xml").write_text(XML.replace("<name>2</name>", "<name>0</name>"))
    ((record, _),) = flickr30k_entities.read(entities, "test")
    assert [region.descriptions for region in record.regions] == [["Two men", "Men"]]


def test_entities_from_the_archive_are_the_same(entities):
    unpacked = list(flickr30k_entities.read(entities, "test"))
    with zipfile.ZipFile(entities / "annotations.zip", "w") as archive:
        for path in sorted(entities.glob("[AS]*/*")):
            archive.write(path, path.relative_to(entities))
            path.unlink()
    for folder in ("Annotations", "Sentences"):
        (entities / folder).rmdir()
    assert list(flickr30k_entities.read(entities, "test")) == unpacked
    (entities / "annotations.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"annotations\.zip: not a zip archive"):
        list(flickr30k_entities.read(entities, "test"))


def test_an_archive_that_grows_is_not_unpacked(entities, monkeypatch):
    with zipfile.ZipFile(entities / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        for kind, suffix in (("Annotations", "xml"), ("Sentences", "txt")):
            bomb.writestr(f"{kind}/36979.{suffix}", " " * 10**6)
            shutil.rmtree(entities / kind)
    monkeypatch.setattr(flickr30k_entities, "LARGEST", 10**5)
    with pytest.raises(ValueError, match=r"36979\.xml: 1000000 bytes once unpacked"):
        list(flickr30k_entities.read(entities, "test"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("Annotations/36979.xml", "</annotation>", "", r"36979\.xml: not readable as XML: .*line 42"),
        ("Annotations/36979.xml", "<width>500", "<width>wide", r"36979\.xml size: .* <width>, found 'wide'"),
        ("Annotations/36979.xml", "<height>400", "<height>0", r"36979\.xml size: .* above 0, found \[500\.0, 0\.0\]"),
        ("Annotations/36979.xml", "<xmax>500</xmax>", "", r"36979\.xml object 2 bndbox: .* <xmax>, found None"),
        ("Annotations/36979.xml", "<name>3</name>", "", r"36979\.xml object 4: no <name>"),
        ("Sentences/36979.txt", "/scene the street]", "/scene the street", r"36979\.txt line 2: .*\[/EN#3/scene"),
        ("Sentences/36979.txt", "#0/notvisual the", "#0 the", r"36979\.txt line 4: expected .*\[/EN#0 the time\]"),
        ("Sentences/36979.txt", SENTENCES, "\n", r"36979\.txt: no captions"),
        ("images/36979_0a1b.jpg", None, "no picture", r"36979_0a1b\.jpg: image cannot be decoded"),
    ],
)
def test_entities_that_are_malformed(entities, file, old, new, message):
    path = entities / file
    text = new if old is None else path.read_text().replace(old, new)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(flickr30k_entities.read(entities, "test"))


def test_what_is_wrong_with_a_photograph_hides_nothing_else_of_it(entities):
    for file, old, new in (
        ("Annotations/36979.xml", "<xmin>251", "<xmin>x"),
        ("Sentences/36979.txt", "Nothing is marked", "[/EN#1 Nothing] is marked"),
    ):
        path = entities / file
        path.write_text(path.read_text().replace(old, new))
    errors = []
    with listing(errors):
        ((record, _),) = flickr30k_entities.read(entities, "test")
    assert [str(error).partition("36979.")[2][:10] for error in errors] == ["xml object", "txt line 3"]
    assert len(record.captions) == 4
    assert record.regions[0].box_xyxy == (0, 0, 50, 50)


def test_files_that_are_damaged_or_not_in_utf8(entities):
    (entities / "Sentences/36979.txt").write_bytes(b"a man\na caf\xe9\n")
    with pytest.raises(ValueError, match=r"36979\.txt line 2: expected UTF-8, found the byte 0xe9"):
        list(flickr30k_entities.read(entities, "test"))
    with zipfile.ZipFile(entities / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Annotations/36979.xml", XML)
    shutil.rmtree(entities / "Annotations")
    content = bytearray((entities / "annotations.zip").read_bytes())
    content[60:90] = bytes(30)
    (entities / "annotations.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"annotations\.zip/Annotations/36979\.xml: cannot be unpacked: "):
        list(flickr30k_entities.read(entities, "test"))
    (entities / "test.txt").write_bytes(b"36979_0a1b\n\xff\n")
    with pytest.raises(ValueError, match=r"test\.txt line 2: expected UTF-8, found the byte 0xff"):
        list(flickr30k_entities.read(entities, "test"))


def test_entities_that_are_absent(entities, tmp_path, caplog):
    with pytest.raises(ValueError, match="split 'dev'; expected train, val or test"):
        list(flickr30k_entities.read(entities, "dev"))
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list"):
        list(flickr30k_entities.read(entities, "train"))
    (entities / "test.txt").write_text("777\n36979_0a1b\n")
    with pytest.raises(FileNotFoundError, match=r"777\.jpg: no such photograph, but test\.txt lists 777"):
        list(flickr30k_entities.read(entities, "test"))
    assert len(list(flickr30k_entities.read(entities, "test", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: 777" in caplog.text
    (entities / "Sentences/36979.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Sentences/36979\.txt: no such file"):
        list(flickr30k_entities.read(entities, "test", allow_missing=True))
    (entities / "Sentences").rmdir()
    with pytest.raises(FileNotFoundError, match=r"neither annotations\.zip nor the folders"):
        list(flickr30k_entities.read(entities, "test"))
    (entities / "images").rename(entities / "photos")
    with pytest.raises(FileNotFoundError, match="no photographs; expected in it a folder flickr30k-images, "):
        list(flickr30k_entities.read(entities, "test"))


def test_real_entities():
    records = [record for record, _ in islice(flickr30k_entities.read(real("flickr8k_entities"), "test"), 40)]
    assert all(len(record.captions) == 5 for record in records)
    assert not any("/EN#" in caption or "]" in caption for record in records for caption in record.captions)
    phrases = [phrase for record in records for phrase in record.phrases]
    assert 0.7 < sum(bool(phrase.boxes_xyxy) for phrase in phrases) / len(phrases) < 0.95
    first = records[0]
    assert (first.id, first.width, first.height) == ("1056338697_4f7d7ce270", 224, 224)
    # Annotated as 369, 44, 500, 180 in a photograph of 500x333.
    taxi = [x for x in first.phrases if first.captions[x.caption][x.start : x.end] == "a taxi"]
    assert taxi[0].boxes_xyxy[1] == pytest.approx((368 * 0.448, 43 * 224 / 333, 224, 180 * 224 / 333))
    assert first.regions[0].descriptions == ["A woman", "The woman", "A blond woman"]
