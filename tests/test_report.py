"""The page about a run: complete, self-contained, and safe with any text."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from xvlm.report import Gallery, Table, write_report

NASTY = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and the text of each kind of element; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def text(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


@pytest.fixture
def path(tmp_path):
    png = BytesIO()
    Image.new("RGB", (30, 20), "red").save(png, format="PNG")
    picture = Image.new("RGBA", (40, 30), (0, 0, 255, 255))
    return write_report(
        tmp_path / "runs" / "one",
        title=NASTY,
        facts={"commit": "a1b2c3d", NASTY: NASTY, "seed": 0, "minutes": 12.3456},
        tables=[
            Table(NASTY, ["method", "acc"], [[NASTY, 0.1], ["none", None], ["rate", 1e-5], ["said", "0.5"]], NASTY)
        ],
        curves=png.getvalue(),
        pictures=[Gallery("best", [(picture, NASTY)], NASTY), Gallery("worst", [])],
    )


def test_everything_is_on_the_page(path):
    assert path.name == "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text("h1") == page.text("title") == [NASTY]
    assert page.text("h2") == [NASTY, "Training", "best", "worst"]
    assert page.text("dt") == ["commit", NASTY, "seed", "minutes"]
    assert page.text("dd") == ["a1b2c3d", NASTY, "0", "12.35"]
    assert page.text("th") == ["method", "acc"]
    assert page.text("td") == [NASTY, "0.100", "none", "–", "rate", "1e-05", "said", "0.5"]
    assert page.text("figcaption") == [NASTY]
    assert page.text("p") == [NASTY, NASTY]


def test_pictures_are_in_the_page_and_nothing_is_fetched(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import", path.read_text(encoding="utf-8"))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    sizes = []
    for attrs in images:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attrs["src"]).groups()
        image = Image.open(BytesIO(base64.b64decode(data)))
        assert image.format.lower() == kind
        sizes.append(image.size)
    assert sizes == [(30, 20), (40, 30)]
    assert images[1]["alt"] == NASTY
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_it_is_readable_on_a_phone_and_in_the_dark(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in page.text("style")[0]


def test_a_column_of_numbers_is_right_aligned_with_its_heading(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "th"] == [None, "number"]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "td"] == [None, "number"] * 4


def test_an_empty_report_is_a_page(tmp_path):
    page = Page(write_report(tmp_path, title="nothing yet").read_text(encoding="utf-8"))
    assert page.text("h1") == ["nothing yet"]
    assert page.text("h2") == []


def test_a_row_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="table 'acc' row 1: 1 cell under 2 columns"):
        write_report(tmp_path, title="t", tables=[Table("acc", ["a", "b"], [["x", 1], ["y"]])])
    assert not (tmp_path / "report.html").exists()
