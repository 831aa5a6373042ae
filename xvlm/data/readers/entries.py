"""What readers share to read files of annotations, so that a check can list every entry that is wrong.

What a file holds is read by :func:`load` and its like. What a reader makes of a line, an annotation or an image is made
inside ``with entry():``. Inside :func:`listing` both list what is wrong and go on; else the first such thing is raised.
"""

import csv
import re
from base64 import b64decode
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, reduce
from itertools import count, islice
from operator import getitem
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

Kind = TypeVar("Kind")
TypeOf = Callable[..., Kind]  # type[Kind] leaves out list[int] and the like
Place = tuple[str | int, ...]  # of a value in a document: ("annotations", 3, "bbox")
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]  # as JSON has it: no text, neither true nor false
Four = tuple[Number, Number, Number, Number]  # a box as a file has it, in the format that the reader states

NAMED = 10  # files or fields that a message names

_brief = Repr()  # never the whole of a value, which a pickle may say holds itself a billion times
_brief.maxstring = _brief.maxother = 200
_brief.maxlist = _brief.maxdict = 10
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as Python keeps them in texts
_PARTS: dict[str, Literal["train", "val", "test"]] = {"train": "train", "val": "val", "dev": "val", "test": "test"}


# ---------------------------------------------------------------------------------------------------------------------
# Errors

Origins = dict[Place, str]  # of values in a record, where a reader has each from; () is the record's own

_LISTED: ContextVar[list[ValueError | OSError] | None] = ContextVar("listed", default=None)
_ORIGINS: ContextVar[dict[str, Origins] | None] = ContextVar("origins", default=None)


@contextmanager
def listing(errors: list[ValueError | OSError] | None, origins: dict[str, Origins] | None = None) -> Iterator[None]:
    """What is wrong with an entry that is read inside goes to this list, and the entries after it are read.

    Args:
        errors: None: to no list; it is raised.
        origins: takes those of each record, by its id.
    """
    before, origins_before = _LISTED.set(errors), _ORIGINS.set(origins)
    try:
        yield
    finally:
        _LISTED.reset(before)
        _ORIGINS.reset(origins_before)


def keep_origins(record: str, origins: Origins) -> None:
    """For a check, which tells where in the files a value is that is wrong."""
    if (kept := _ORIGINS.get()) is not None:
        kept[record] = origins


@contextmanager
def entry(where: str = "") -> Iterator[None]:
    """Around all that a reader does about a line, an annotation or an image, so that :func:`listing` can go on.

    Args:
        where: for the message about a part of a record that is made inside and may be wrong (a label without words).
    """
    try:
        yield
    except (ValueError, OSError) as error:
        _raise_or_list([explained(where, error) if isinstance(error, ValidationError) else error])


def _raise_or_list(errors: list[ValueError | OSError]) -> None:
    listed = _LISTED.get()
    if listed is None:
        raise errors[0] from None
    listed += errors


def explained(where: str, error: ValidationError) -> ValueError:
    """All that is wrong as one line: where, and of each field what is expected and what was found."""
    return ValueError(": ".join(filter(None, [where, *_messages(None, error).values()])))


def _messages(document: Any, wrong: ValidationError) -> dict[Place, str]:
    """What is wrong with each entry of a document, an element of an array; () is the document as a whole.

    Args:
        document: what was validated; None: no document, but values that are no plain ones.
    """
    expected: dict[Place, dict[Place, list[str]]] = defaultdict(lambda: defaultdict(list))
    found: dict[Place, str] = {}
    for error in wrong.errors(include_url=False):
        kind, way, value = error["type"], error["loc"], error["input"]
        entry_at, place = (), way[:-1] if kind == "missing" else way
        if document is not None and kind != "json_invalid":
            entry_at, place, value = _located(document, error)
        message = error["msg"].removeprefix("Value error, ")
        if kind == "missing" and isinstance(way[-1], int):  # one for each number that a box lacks
            message = f"expected {way[-1] + 1} values"
            expected[entry_at][place] = expected[entry_at][place][: -1 if way[-1] > len(error["input"]) else None]
        elif kind == "missing" and place == way[:-1]:
            place, value = way, list(value)
        elif kind == "extra_forbidden":  # only records forbid
            message = "records have no such field (xvlm data schema prints those they have)"
        said = expected[entry_at][place]
        message = message.removeprefix("Input should be ") if said else message
        said += [] if message in said else [message]
        found[place] = (
            "" if kind in ("json_invalid", "value_error", "extra_forbidden") else f" (found {_brief.repr(value):.200})"
        )
    return {
        entry_at: "; ".join(
            ": ".join(filter(None, [".".join(map(str, place)), " or ".join(said) + found[place]]))
            for place, said in islice(fields.items(), NAMED)
        )
        for entry_at, fields in expected.items()
    }


def _located(document: Any, error: ErrorDetails) -> tuple[Place, Place, Any]:
    """The entry that a wrong value is in, the way to it as far as the document has it, and what is there.

    An entry is the innermost element of an array that is an object, or should be.
    """
    entry_at, place, value = (), (), document
    for part in error["loc"]:
        if isinstance(value, dict) and place and isinstance(place[-1], int):
            entry_at = place
        try:
            value = value[part]
        except (LookupError, TypeError):  # missing, or the name of a type that the value might have had
            break
        place = (*place, part)
    if error["type"] in ("model_type", "dataclass_type") and isinstance((place or ("",))[-1], int):
        entry_at = place
    return entry_at, place, value


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def load(kind: TypeOf[Kind], path: Path) -> Kind:
    """A JSON file as a pydantic model or another type. The file and what is kept of it are in memory at once.

    Raises:
        FileNotFoundError: names the file.
        ValueError: as :func:`checked`.
    """
    try:
        return checked(kind, str(path), path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None


def load_lines(kind: TypeOf[Kind], path: Path) -> Iterator[tuple[str, Kind]]:
    """Rows of a JSON lines file, each with the name it has in messages. Raises as :func:`load` does."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path} line {number}"
                with entry():
                    yield where, checked(kind, where, line)


_adapter = cache(TypeAdapter)


def checked(kind: TypeOf[Kind], where: str, given: Any) -> Kind:
    """JSON (bytes) or plain values as a type.

    Inside :func:`listing`, elements of arrays that are wrong are listed and left out, and the others are read.

    Raises:
        ValueError: not JSON, or not of this type; names the entry, the field, what is expected and what was found.
    """
    given = given.removeprefix(BOM_UTF8) if isinstance(given, bytes) else given
    try:
        validate = _adapter(kind).validate_json if isinstance(given, bytes) else _adapter(kind).validate_python
        return validate(given)
    except ValidationError as error:
        wrong = error
    try:
        document = from_json(given) if isinstance(given, bytes) else given
    except ValueError:
        raise explained(where, wrong) from None
    messages = _messages(document, wrong)
    if () in messages:
        raise ValueError(f"{where}: {messages[()]}")
    _raise_or_list([ValueError(f"{where}: {message}") for message in messages.values()])
    return _without(messages, document, kind)


class _Rest(list[Kind]):
    """What is left of an array, and the numbers that its elements had in it."""

    def __init__(self, elements: Iterable[Kind], numbers: list[int]):
        super().__init__(elements)
        self.numbers = numbers


def _without(entries: Collection[Place], document: Any, kind: TypeOf[Kind]) -> Kind:
    numbers: dict[Place, list[int]] = {}
    for array_at in sorted({entry_at[:-1] for entry_at in entries}, key=len, reverse=True):  # the inner ones first
        array = reduce(getitem, array_at, document)
        numbers[array_at] = [i for i in range(len(array)) if (*array_at, i) not in entries]
        array[:] = [array[i] for i in numbers[array_at]]
    value = _adapter(kind).validate_python(document)
    for array_at, left in numbers.items():
        if not array_at:
            return _Rest(value, left)
        holder = reduce(lambda part, name: getattr(part, str(name), None), array_at[:-1], value)
        if hasattr(holder, str(array_at[-1])):  # fields of models; nobody asks for the numbers of others
            setattr(holder, array_at[-1], _Rest(getattr(holder, array_at[-1]), left))
    return value


def numbered(where: str, entries: list[Kind]) -> Iterator[tuple[str, Kind]]:
    """Entries of an array that :func:`load` read, each with the name it has in messages.

    Args:
        where: what comes before its number in the file ("train.json: images.").
    """
    for i, each in zip(entries.numbers if isinstance(entries, _Rest) else count(), entries, strict=False):
        yield f"{where}{i}", each


def by_id(where: str, entries: list[Kind], name: str = "id") -> dict[Any, Kind]:
    """Entries by their id; one that is there twice, the same in all, counts once.

    Args:
        where: as of :func:`numbered`.
        name: of the id.

    Raises:
        ValueError: a different entry has the same id; names the later one.
    """
    known: dict[Any, Kind] = {}
    for place, each in numbered(where, entries):
        with entry():
            if (before := known.setdefault(getattr(each, name), each)) is not each and before != each:
                raise ValueError(f"{place}: {name} {getattr(each, name)!r} is that of another entry before it")
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Tables and folders


def decoded(where: str, content: bytes) -> str:
    """A text of a file in UTF-8, without its byte order mark. Raises ValueError that says in which line it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where} line {line}: expected UTF-8, found the byte 0x{content[error.start]:02x}") from None


def decoded_64(where: str, text: str) -> bytes:
    """Bytes of a file that was written in base64. Raises ValueError unless that is what the text is."""
    try:
        return b64decode("".join(text.split()), validate=True)  # MIME breaks lines
    except ValueError as error:
        raise ValueError(f"{where}: not base64: {error} (found {text[:40]!r} …)") from None


def load_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Cells of each row of a CSV file in UTF-8, the heading's too, with the name it has in messages.

    Raises:
        ValueError: not CSV, or not in UTF-8; names the file and the line.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, strict=True)
        while True:
            with entry():
                where = f"{path} line {table.line_num + 1}"  # where it begins
                try:
                    row = next(table, None)
                except csv.Error as error:
                    raise ValueError(f"{where}: not readable as CSV: {error}") from None
                if row is None:
                    return
                if escaped := _ESCAPED.search("".join(row)):
                    byte = ord(escaped[0]) - 0xDC00
                    raise ValueError(f"{where}: expected UTF-8, found the byte 0x{byte:02x}; save it as CSV UTF-8")
                if row:
                    yield where, [cell.strip() for cell in row]


def load_table(path: Path) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The heading of a CSV file, and its rows by column with their names in messages. Raises ValueError likewise."""
    lines = load_cells(path)
    with listing(None):  # no row makes sense without it
        _, heading = next(lines, ("", []))

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        for where, cells in lines:
            with entry():
                if len(cells) != len(heading):
                    raise ValueError(f"{where}: expected {len(heading)} cells, as in the heading, found {len(cells)}")
                yield where, dict(zip(heading, cells, strict=True))

    return heading, rows()


def only(folder: Path, *patterns: str) -> Path | None:
    """The file that fits the first pattern that any file fits; none fits: None.

    Raises:
        ValueError: several files fit; names them.
    """
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found[:NAMED])
            raise ValueError(f"{folder}: expected one file {pattern}, found {names}")
        if found:
            return found[0]
    return None


def files_of(folder: Path, files: Sequence[Path], *patterns: str) -> Sequence[Path]:
    """The files of annotations that were asked for by name; none: the one that :func:`only` finds.

    Raises:
        FileNotFoundError: one is not there, or nothing fits; says what would.
    """
    if absent := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{absent[0]}: no such file")
    if files:
        return files
    if (found := only(folder, *patterns)) is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)} in it (--file names another)")
    return [found]


def part_of(where: Path | str, split: str) -> Literal["train", "val", "test"]:
    """The part that a split's name begins with: train2014, validation and dev, testA.

    Raises:
        ValueError: it begins with none; says where.
    """
    named = re.match("|".join(_PARTS), split)
    if named is None:
        raise ValueError(f"{where}: split {split!r}; expected a name that begins with {', '.join(_PARTS)}")
    return _PARTS[named[0]]
