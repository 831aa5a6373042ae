"""One self-contained HTML page about a run: what was done, the numbers, the curves, and examples to look at."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from xvlm.hub import write_atomically
from xvlm.prose import counted

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Numbers under headings; ``note`` says below it how they were obtained."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures, each with its caption ("the best", "the worst"); ``note`` says how they were chosen."""

    title: str
    pictures: Sequence[tuple[Image.Image, str]]
    note: str = ""


def write_report(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, Cell] | None = None,
    tables: Sequence[Table] = (),
    curves: bytes | None = None,
    pictures: Sequence[Gallery] = (),
) -> Path:
    """Write ``folder/report.html`` with everything in it: no other file, no network, no script.

    Args:
        folder: made if it is not there.
        facts: what was run: commit, seed, machine, minutes.
        curves: a PNG of the training curves, see :func:`xvlm.viz.curves`.

    Returns:
        The path of the page.

    Raises:
        ValueError: a table's row has another number of cells than the table has columns.
    """
    sections = [_facts(facts)] if facts else []
    sections += [_table(table) for table in tables]
    if curves:
        drawn = f'<div class="scroll"><img class="wide" src="{_png(curves)}" alt="training curves"></div>'
        sections.append(f"<section><h2>Training</h2>\n{drawn}</section>")
    sections += [_gallery(gallery) for gallery in pictures]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    body = "\n".join(sections)
    write_atomically(page, _PAGE.format(title=escape(title), style=_STYLE, body=body))
    return page


def _facts(facts: Mapping[str, Cell]) -> str:
    items = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>\n{items}\n</dl>"


def _table(table: Table) -> str:
    for i, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            cells, columns = counted(len(row), "cell"), counted(len(table.columns), "column")
            raise ValueError(f"table {table.title!r} row {i}: {cells} under {columns}")
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    kinds = [' class="number"' if numbers else "" for numbers in numeric]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, table.columns, strict=True))
    cells = [[f"<td{kind}>{_cell(value)}</td>" for kind, value in zip(kinds, row, strict=True)] for row in table.rows]
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    grid = f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    return f"<section><h2>{escape(table.title)}</h2>\n{grid}\n{_note(table.note)}</section>"


def _gallery(gallery: Gallery) -> str:
    figures = "\n".join(
        f'<figure><img src="{_jpeg(picture)}" alt="{escape(caption)}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{escape(caption)}</figcaption></figure>'
        for picture, caption in gallery.pictures
    )
    title = f"<h2>{escape(gallery.title)}</h2>"
    return f'<section>{title}\n{_note(gallery.note)}<div class="gallery">\n{figures}\n</div></section>'


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>\n' if note else ""


def shown(value: Cell) -> str:
    """A cell as people read it."""
    if value is None:
        return "–"
    if isinstance(value, float):  # shares line up under each other; losses and rates keep their digits
        return f"{value:.3f}" if 0.01 <= abs(value) <= 1 or value == 0 else f"{value:.4g}"
    return str(value)


def _cell(value: Cell) -> str:
    return escape(shown(value))


def _is_number(value: Cell) -> bool:
    try:
        float(value or 0)
    except ValueError:
        return False
    return True


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: Image.Image) -> str:
    data = BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5d6671; --line: #d9dee4; --plate: #f5f7f9; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --line: #343b43; --plate: #1e2329; --page: #14181c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem; margin: 0; }
dl div { background: var(--plate); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
dt, .note, figcaption { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-weight: 600; }
.note { margin: .5rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-size: .875rem; font-weight: 600; }
td.number, th.number { text-align: right; }
img { max-width: 100%; height: auto; display: block; border-radius: .4rem; }
img.wide { min-width: 46rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; }
figcaption { margin-top: .35rem; white-space: pre-line; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
