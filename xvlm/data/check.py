"""Looks at all records of a packed folder or a source, lists what is wrong, and writes what can safely be put right."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from xvlm import hub
from xvlm.data.cache import Cache, is_remote
from xvlm.data.images import Undecodable
from xvlm.data.leaks import Look, Looks, look_at
from xvlm.data.parallel import ordered_map
from xvlm.data.problems import KINDS, Item, Problem, boxes_of, others_of, problems_of, put_right, unreadable
from xvlm.data.readers.entries import Origins, listing
from xvlm.data.records import Record, unchecked
from xvlm.data.shards import INDEX, Shard, captioned, read_index
from xvlm.data.writing import write_shards

CHANGES = "changes.jsonl"
CORNER, ENOUGH = 0.5, 20  # the share of boxes ending in the lower right corner that is no chance, of so many at least


@dataclass
class Report:
    """What a check found.

    Args:
        records: how many were looked at.
        problems: in the order of the records; after fixing, those that remain.
        changes: one mapping for each value that was put right and each record that was left out.
    """

    records: int = 0
    problems: list[Problem] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> list[str]:
        """A line for each kind of problem, the commonest first."""
        counts = Counter(problem.kind for problem in self.problems)
        return [f"{kind}: {count} ({KINDS[kind]})" for kind, count in counts.most_common()]


def packed(folder: Path, cache: Cache = Cache()) -> Iterator[Item | Problem]:  # noqa: B008 (it never changes)
    """The records of a packed folder as they stand there, and what is wrong with its files.

    Args:
        cache: where shards from elsewhere are kept.

    Raises:
        FileNotFoundError, ValueError: there is no index, or it cannot be read.
    """
    for shard in read_index(folder).shards:
        place = shard.file if is_remote(shard.file) else str(folder / shard.file)
        try:
            file = cache.open(place)
        except FileNotFoundError:
            yield Problem("shard", (), f"no such file, but {INDEX} lists it", where=place)
            continue
        except OSError as error:
            yield Problem("shard", (), str(error), where=place)
            continue
        with file:
            if shard.sha256 and hub.sha256_of(file) != shard.sha256:
                yield Problem("shard", (), "not the bytes that were packed", where=place)
            length = os.fstat(file.fileno()).st_size
            for key, *extents in shard.samples:
                name = key.rpartition("/")[2]
                if max(extents[0] + extents[1], extents[2] + extents[3]) > length:
                    yield Problem("shard", (), "the shard ends before it", where=place, record=name)
                    continue
                image, text = (os.pread(file.fileno(), extents[i + 1], extents[i]) for i in (0, 2))
                try:
                    yield Item(place, name, _document(shard, place, name, image, text), image)
                except ValueError as error:
                    yield Problem("record", (), str(error), where=place, record=name)


def _document(shard: Shard, place: str, name: str, image: bytes, text: bytes) -> dict[str, Any]:
    """A record as it stands there; of an image with a caption, what is made of them. Raises ValueError."""
    if shard.text == "txt":
        return captioned(name, place, image, text).model_dump(mode="json", exclude_defaults=True)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a mapping (found {document!r:.120})")
    return document


def read(samples: Iterable[tuple[Record, bytes]], where: str) -> Iterator[Item | Problem]:
    """What a reader yields, boxes and spans unchecked; what it cannot read; and the error that stopped it, if one did.

    Args:
        where: the folder it reads, for messages.
    """
    samples, errors = iter(samples), []
    origins: dict[str, Origins] = {}
    while True:
        stopped, sample = None, None
        try:
            with unchecked(), listing(errors, origins):
                sample = next(samples, None)
        except (ValueError, OSError) as error:
            stopped = Problem("reader", (), f"{error}; what follows was not looked at", where=where)
        for error in errors:
            known = isinstance(error, Undecodable)
            yield unreadable(error, where=where) if known else Problem("reader", (), str(error), where=where)
        errors.clear()
        if stopped is not None:
            yield stopped
        if sample is None:
            return
        record, image = sample
        of = origins.pop(record.id, {})
        yield Item(of.get((), where), record.id, record.model_dump(mode="json", exclude_defaults=True), image, of)


def check(
    items: Iterable[Item | Problem],
    *,
    max_words: int = 40,
    near_duplicates: bool = False,
    boxes_turned: bool = False,
    ignore: Collection[str] = (),
    workers: int = 0,
    fix: Path | None = None,
    progress: bool = False,
) -> Report:
    """Everything that is wrong with records.

    Args:
        items: of :func:`packed` or :func:`read`.
        max_words: of a text; the default is what a processor reads by default.
        near_duplicates: list images that look like an earlier one, too.
        boxes_turned: boxes are of the pictures as their EXIF turns them, not of the stored pixels.
        ignore: kinds of problems that are neither reported nor put right.
        workers: processes that decode images; 0: this one.
        fix: a new folder, where the records are packed with what can safely be put right put right. Records that are
            not valid then either are left out. ``changes.jsonl`` there lists both.

    Raises:
        FileExistsError: ``fix`` is packed already.
        ValueError: to fix, but no record can be packed.
    """
    report = Report()
    find = partial(problems_of, max_words=max_words, boxes_turned=boxes_turned)
    look = partial(_look, find=find, ignore=ignore, hashed=near_duplicates, fix=fix is not None)
    bar = tqdm(items, desc="checking", unit="record", disable=not progress)
    seen = _gathered(ordered_map(look, bar, workers), report, fix is not None)
    if fix is None:
        for _ in seen:
            pass
    else:
        if (first := next(seen, None)) is None:
            said = chain(map(str, report.problems), *(change["because"] for change in report.changes))
            raise ValueError(f"{fix}: there is no record to pack: {next(said, 'none was found')}")
        write_shards(chain([first], seen), fix, description={"fixed": True}, progress=False)
        hub.write_atomically(fix / CHANGES, "".join(json.dumps(change) + "\n" for change in report.changes))
    report.problems = [problem for problem in report.problems if problem.kind not in ignore]
    return report


class _Seen(NamedTuple):
    """A record that was looked at; its image is kept only where it can be packed and is to be."""

    where: str
    record: str
    problems: list[Problem]
    digest: bytes
    look: Look | None
    boxes: int
    in_corner: int
    others: list[tuple[int, str]]  # statements, and the records they are about as well
    sample: tuple[Record, bytes] | None


def _look(
    item: Item | Problem,
    find: Callable[[Item], tuple[list[Problem], Image.Image | None]],
    ignore: Collection[str],
    hashed: bool,
    fix: bool,
) -> _Seen | Problem:
    if isinstance(item, Problem):
        return item
    try:
        found, picture = find(item)
    except RecursionError:
        return Problem("record", (), "nested too deeply for a record", where=item.where, record=item.record)
    problems = [problem for problem in found if problem.kind not in ignore]
    corner = [item.document.get("width"), item.document.get("height")]
    boxes = boxes_of(item.document)
    sample = None
    if fix and not any(problem.fix == "leave out" or problem.kind == "record" for problem in found):
        with suppress(ValueError):  # the problems say why
            sample = put_right(item, problems)
    return _Seen(
        where=item.where,
        record=item.record,
        problems=problems,
        digest=hashlib.sha256(item.image + json.dumps(item.document, sort_keys=True).encode()).digest(),
        look=look_at(picture) if hashed and picture is not None else None,
        boxes=len(boxes),
        in_corner=sum(list(box)[2:] == corner for box in boxes if isinstance(box, list)),
        others=[] if "other-missing" in ignore else others_of(item.document),
        sample=sample,
    )


def _gathered(seen: Iterable[_Seen | Problem], report: Report, fix: bool) -> Iterator[tuple[Record, bytes]]:
    """Fills the report, and yields what is to be packed."""
    first: dict[str, _Seen] = {}
    here: set[str] = set()
    waiting: dict[str, list[_Seen]] = defaultdict(list)  # for the record that a statement is about as well
    boxes = in_corner = 0
    for one in seen:
        if isinstance(one, Problem):
            if fix and one.fix == "leave out":  # its reader has done so
                report.changes += _changes(one.record, [one], False)
            else:
                report.problems.append(one)
            continue
        report.records += 1
        boxes, in_corner = boxes + one.boxes, in_corner + one.in_corner
        if one.record in first:
            one = one._replace(problems=[*one.problems, _repeated(one, first[one.record])], sample=None)
        else:
            first[one.record] = one._replace(sample=None, problems=[])
        if one.sample is not None or not fix:
            here.add(one.record)
        for each in [one, *waiting.pop(one.record, [])]:
            if absent := next((other for _, other in each.others if other not in here), None):
                waiting[absent].append(each)
            else:
                yield from _told(each, report, fix)
    for each in chain.from_iterable(waiting.values()):
        yield from _told(_without_others(each, here), report, fix)
    if boxes >= ENOUGH and in_corner > CORNER * boxes:
        message = f"{in_corner} of {boxes} boxes end in the lower right corner of their image, as if cut off there"
        where = str(Path(next(iter(first.values())).where).parent)
        report.problems.append(Problem("box-looks-xyxy", (), message, where=where))
    report.problems += _near_duplicates([one for one in first.values() if one.look is not None])


def _told(one: _Seen, report: Report, fix: bool) -> Iterator[tuple[Record, bytes]]:
    problems = one.problems
    if fix:
        report.changes += _changes(one.record, problems, one.sample is not None)
        problems = [problem for problem in problems if problem.fix is None]
    report.problems += problems
    if one.sample is not None:
        yield one.sample


def _without_others(one: _Seen, here: Collection[str]) -> _Seen:
    """With a problem for each statement about an image that is not here, and without the statement."""
    message, more = "expected the id of a record that is here", {"where": one.where, "record": one.record}
    problems = [
        Problem("other-missing", ("statements", i), message, other, fix="drop", **more)
        for i, other in one.others
        if other not in here
    ]
    sample = one.sample
    if sample is not None:
        record, image = sample
        kept = [statement for statement in record.statements if statement.other in here]
        sample = record.model_copy(update={"statements": kept}), image
    return one._replace(problems=[*one.problems, *problems], sample=sample)


def _repeated(one: _Seen, earlier: _Seen) -> Problem:
    same = one.digest == earlier.digest
    message = f"an earlier record has this id, and is {'the same in all' if same else 'another one'}"
    fix = "leave out" if same else None
    return Problem("duplicate-id", ("id",), message, fix=fix, where=one.where, record=one.record)


def _changes(record: str, problems: list[Problem], packed: bool) -> Iterator[dict[str, Any]]:
    if not packed:
        yield {"record": record, "fix": "leave out", "because": [str(problem) for problem in problems]}
        return
    for problem in problems:
        if problem.fix is not None:
            place = ".".join(map(str, problem.place))
            change = {"record": record, "fix": problem.fix, "kind": problem.kind, "place": place}
            better = {"better": problem.better} if problem.fix == "put" else {}
            yield change | {"found": problem.found} | better


def _near_duplicates(hashed: list[_Seen]) -> Iterator[Problem]:
    """One problem for each image that looks like an earlier one."""
    index = Looks([one.look for one in hashed])
    for i, one in enumerate(hashed):
        earlier = [near for near in index.near(one.look) if near.index < i]
        if earlier:
            other, distance = hashed[earlier[0].index], earlier[0].distance
            message = f"looks like record {other.record} ({distance} of 64 bits differ)"
            yield Problem("near-duplicate", ("image",), message, where=one.where, record=one.record)
