"""Reads NLVR2: sentences about two photographs, true or false.

Files as published (Suhr et al. 2019, https://github.com/lil-lab/nlvr), JSON lines::

    folder/{split}.json                                  train, dev, test1, test2; in data/ or nlvr2/data/ as well
    folder/images/train/37/train-10171-0-img0.png        the directory as the line says, or without it
    folder/images/dev/dev-850-0-img0.png                 or folder/dev/, or all in folder/images/

No boxes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from xvlm.data.readers.entries import entry, load_lines, only, part_of
from xvlm.data.readers.photographs import AllowMissing, Photographs, Sample, record
from xvlm.data.records import Statement

SOURCE = "nlvr2"


class Line(BaseModel):
    identifier: str
    sentence: str
    label: Literal["True", "False"]
    directory: int | None = None
    left_url: str = ""
    right_url: str = ""


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored: the right photograph of a pair, then the left one with the statements.

    A pair of which one photograph is absent is left out as a whole.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, dev, test1 or test2.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave pairs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no sentences, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the line and the field.
    """
    part = part_of(folder, split)
    path = only(folder, f"{split}.json", f"data/{split}.json", f"nlvr2/data/{split}.json")
    if path is None:
        raise FileNotFoundError(f"{folder}: no {split}.json, in it, in data/ or in nlvr2/data/ of it")
    lines_of: dict[str, list[tuple[str, Line]]] = {}
    for where, line in load_lines(Line, path):
        with entry():
            pair, _, sentence = line.identifier.rpartition("-")
            if not pair or not sentence.isdigit():
                raise ValueError(f"{where}: identifier {line.identifier!r}; expected one like train-10171-0-0")
            lines_of.setdefault(pair, []).append((where, line))
    with Photographs(folder, f"images/{split}", split, "images", at=images_at, allow_missing=allow_missing) as images:
        for pair, lines in lines_of.items():
            with entry():
                where, first = lines[0]
                names = [f"{pair}-img{side}.png" for side in (0, 1)]
                left, right = (images.find(f"{where} is about it", name, f"{first.directory}/{name}") for name in names)
                if left is None or right is None:
                    continue
                left_id, right_id = (Path(name).stem for name in names)
                statements = []
                for where, line in lines:
                    with entry(where):
                        said = Statement(
                            text=line.sentence.strip(), other=right_id, label=line.label == "True", id=line.identifier
                        )
                        statements.append(said)
                # The right one first: whoever stops after n records then has it for every statement.
                for found, number, url, said in (
                    (right, right_id, first.right_url, []),
                    (left, left_id, first.left_url, statements),
                ):
                    made = record(
                        f"{path}: {number}", found, id=number, source=SOURCE, split=part, statements=said, credit=url
                    )
                    yield made, found.image
