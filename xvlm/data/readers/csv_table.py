"""Reads your own table: a CSV file with a row per text, about an image or about a box in it.

::

    folder/{split}.csv                 UTF-8, separated by commas, with a heading
    folder/FILE                        as ``image`` says: from the folder, from images/ or {split}/ of it, or absolute

    image,left,top,right,bottom,text
    a.jpg,10,20,110,100,a dog that sleeps
    a.jpg,,,,,a dog on a sofa

The names of the columns, in small letters or capitals, decide what they are; any others are an error:

- ``image``: path of the image.
- ``left,top,right,bottom`` or ``xmin,ymin,xmax,ymax``: the box by its edges, right and bottom exclusive.
- ``x,y,width,height``: the box by its left top corner and its size.
- ``text``: describes the box; a caption where the row's box is empty.
- ``label``: what is in the box, the name of its class.
- ``attributes``: adjectives for the label, separated by ``;``.
- ``caption``: of the image, whether the row has a box or not.
- ``split``: the part that the image is of (train, val, ...); one table may then hold all of them.

Boxes are in pixels of the stored image. The folder's name becomes the records' source. The table is held in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from xvlm.data.problems import LOOK_XYWH, looks_xywh
from xvlm.data.readers.entries import Origins, entry, files_of, load_table, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Found,
    Photographs,
    Sample,
    corners,
    known_as,
    record,
    tidy,
)
from xvlm.data.records import Box, Object, Record, Region

EDGES = (("left", "top", "right", "bottom"), ("xmin", "ymin", "xmax", "ymax"))
CORNER_AND_SIZE = ("x", "y", "width", "height")
TEXTS = ("text", "label", "caption")
SHOWN = 200  # characters of a heading that makes no sense

Row = dict[str, str]
Said = tuple[str, Row, tuple[str, ...]]  # what a row is called in messages, the row, its table's columns of the box


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per image, with all that its rows say.

    ``text`` with a box becomes a region, ``label`` an object, the rest captions (the same caption again is left out).
    Boxes are cut off at the border of the image.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no table, or an image is absent.
        ValueError: columns that are missing or unknown, a row without text, a box that is incomplete, no numbers or
            not in the image, attributes without a label, an image of two splits, or a split that no row is of; names
            the file, the line and the column.
    """
    part = part_of(folder, split)
    rows_of = _rows(files_of(folder, files, f"{split}.csv"), split)
    source = folder.resolve().name
    places = (".", "images", f"images/{split}", split)
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for name, rows in rows_of.items():
            with entry():
                found = images.find(f"{rows[0][0]} lists it", name)
                if found is not None:
                    of = {"id": images.id_of(name), "source": source, "split": part}
                    yield _record(name, rows, found, of), found.image


def splits_of(path: Path) -> set[str]:
    """What the column ``split`` of a table says; nothing: it has none, and all rows are of any split that is asked for.

    Raises:
        ValueError: a row that cannot be read; names the file and the line.
    """
    heading, rows = load_table(path)
    columns = [column for column in heading if column.lower() == "split"]
    return {cells[column] for _, cells in rows for column in columns}


def _rows(paths: Sequence[Path], split: str) -> dict[str, list[Said]]:
    """The rows of each image that are of this split."""
    rows_of: dict[str, list[Said]] = {}
    split_of: dict[str, str] = {}
    for path in paths:
        _check_is_table(path)
        heading, rows = load_table(path)
        columns = _box_columns(path, [column.lower() for column in heading])
        for where, cells in rows:
            with entry():
                row = {column.lower(): cell for column, cell in cells.items()}
                name, named = tidy(row["image"]), row.get("split", split)
                if not name:
                    raise ValueError(f"{where}: image is empty")
                part_of(where, named)
                if (before := split_of.setdefault(name, named)) != named:
                    raise ValueError(f"{where}: split {named!r}, but {name} is of {before!r} before; expected one")
                if named == split:
                    rows_of.setdefault(name, []).append((where, row, columns))
    if split_of and not rows_of:
        raise ValueError(f"{paths[0]}: no row of split {split!r}; it has {', '.join(sorted({*split_of.values()}))}")
    return rows_of


def _check_is_table(path: Path) -> None:
    """Raises ValueError about a file that is empty or JSON, or whose cells are separated by something else."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.readline(SHOWN).strip()
        if not start and not file.read(1):
            raise ValueError(f"{path}: the file is empty")
    if start.startswith(("{", "[")):
        raise ValueError(f"{path}: this looks like JSON, not like a table; for the reader coco_json or json_lines?")
    for name, separator in (("';'", ";"), ("tabs", "\t")):
        if "," not in start and separator in start:
            raise ValueError(f"{path}: separated by {name}; save it as CSV with commas")


def _box_columns(path: Path, heading: list[str]) -> tuple[str, ...]:
    """None: no boxes. Raises ValueError about columns that are missing or unknown."""
    known = (*EDGES, CORNER_AND_SIZE)
    layouts = [layout for layout in known if set(layout) <= set(heading)]
    box = layouts[0] if len(layouts) == 1 else ()
    meant = max(known, key=lambda layout: len(set(layout) & set(heading)))
    absent = [name for name in meant if name not in heading] if set(meant) & set(heading) else []
    unknown = set(heading) - {"image", *meant, *TEXTS, "attributes", "split"}
    wrong = [
        *(["one only, so no commas between them"] if len(heading) == 1 else []),
        *([f"several of {name}" for name in dict.fromkeys(heading) if heading.count(name) > 1]),
        *([f"unknown {', '.join(sorted(unknown)):.{SHOWN}}"] if unknown else []),
        *([f"no {', '.join(absent)}"] if absent else []),
        *(["no image"] if "image" not in heading else []),
        *(["no text"] if not set(TEXTS) & set(heading) else []),
        *(["label without a box"] if "label" in heading and not box else []),
    ]
    if wrong:
        boxes = " or ".join(",".join(layout) for layout in (*EDGES, CORNER_AND_SIZE))
        raise ValueError(
            f"{path}: columns: {'; '.join(wrong)}; expected image, a box as one of {boxes} or none, at least one of "
            f"{','.join(TEXTS)}, and perhaps attributes, split; found {','.join(heading):.{SHOWN}}"
        )
    return box


def _record(name: str, rows: list[Said], found: Found, of: dict[str, str]) -> Record:
    captions: list[str] = []
    regions: list[Region] = []
    objects: list[Object] = []
    origins: Origins = {}
    for where, row, columns in rows:
        with entry(where):
            box = _box(where, row, columns, found)
            text, label, caption = (row.get(column, "") for column in TEXTS)
            if not (text or label or caption):
                raise ValueError(f"{where}: no text; expected one in {', '.join(TEXTS)}")
            if label and box is None:
                raise ValueError(f"{where}: label {label!r}, but {','.join(columns)} are empty")
            if box is not None and not (text or label):
                raise ValueError(f"{where}: a box, but text and label, which say what is in it, are empty or absent")
            if row.get("attributes") and not label:
                raise ValueError(f"{where}: attributes {row['attributes']!r}, but label is empty or absent")
            captions += [caption] if caption else []
            if text and box is None:
                captions.append(text)
            elif text:
                origins["regions", len(regions)] = where
                regions.append(Region(box_xyxy=box, descriptions=[text]))
            if label:
                origins["objects", len(objects)] = where
                adjectives = [word.strip() for word in row.get("attributes", "").split(";") if word.strip()]
                objects.append(Object(box_xyxy=box, label=label, attributes=adjectives))
    return record(
        rows[0][0],
        found,
        origins,
        captions=list(dict.fromkeys(captions)),
        regions=regions,
        objects=objects,
        original_id=name,
        same_as=known_as(name),
        **of,
    )


def _box(where: str, row: Row, columns: tuple[str, ...], found: Found) -> Box | None:
    """The row's box as ``xyxy``; None where its cells are empty."""
    cells = [row[column] for column in columns]
    if not any(cells):
        return None
    try:
        a, b, c, d = (float(cell) for cell in cells)
    except ValueError:
        raise ValueError(f"{where}: {','.join(columns)}: expected four numbers, found {','.join(cells)}") from None
    if columns == CORNER_AND_SIZE:
        return found.nearly_inside(where, corners((a, b, c, d)))
    try:
        return found.nearly_inside(where, (a, b, c, d))
    except ValueError as error:
        if looks_xywh((a, b, c, d), (found.width, found.height)):
            raise ValueError(f"{error}; {LOOK_XYWH}") from None
        raise
