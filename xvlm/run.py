"""What every training script does around its task: the command line, the run's folder, its corpus, a good end."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from xvlm import distributed, hub, probe, runlog, train
from xvlm.config import ConfigError, Configured, dump_config, load_config
from xvlm.data.pack import CorpusConfig, pack
from xvlm.data.processor import Processor
from xvlm.data.shards import INDEX, Shards
from xvlm.data.stream_config import StreamConfig, locate
from xvlm.data.streams import UnusableData
from xvlm.models import checkpoints
from xvlm.models.card import Card, table, write_card
from xvlm.models.xvlm import Pretrained
from xvlm.optim import OptimConfig
from xvlm.train import TrainConfig

FACTS = ("commit", "seed", "machine", "torch", "device", "minutes")  # of a result, how it came about
LEARNED_FROM = "learned_from.json"  # in a run folder: the SHA-256 of the tables and indexes that it learns from


class RunConfig(Configured):
    """What runs have in common."""

    out: Path
    title: str
    corpus: CorpusConfig | None = None  # packed first; what names no shards then reads <corpus.out>/<split>
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


Run = TypeVar("Run", bound=RunConfig)


def packed_to(values: Any) -> dict[str, str]:
    """The folder of each split of the corpus in a configuration's values; of none where they have no corpus."""
    match values:
        case {"corpus": {"out": out, "splits": {**splits}}}:
            return {split: str(Path(str(out)) / split) for split in splits}
    return {}


def reading(values: Any, place: str, shards: Any) -> Any:
    """A configuration's values with ``shards`` in each mapping at a place that names none.

    Args:
        place: keys, ``*`` for any: ``streams.*``.
        shards: None changes nothing.
    """
    key, _, rest = place.partition(".")
    if shards is None or not isinstance(values, dict):
        return values
    if not key:
        return values if {"shards", "sources"} & values.keys() else values | {"shards": shards}
    keys = values.keys() if key == "*" else values.keys() & {key}
    return values | {each: reading(values[each], rest, shards) for each in keys}


def command(kind: type[Run], work: Callable[[Run, bool], None], arguments: Sequence[str]) -> None:
    """``CONFIG [key=value …] [--show | --dry-run]``: print the configuration, or work on it.

    Args:
        work: given the configuration and whether this is a dry run, in which nobody is told through trackers.
    """
    flags = {word for word in arguments if word.startswith("--")}
    if unknown := flags - {"--show", "--dry-run"}:
        raise ConfigError(f"unknown option {sorted(unknown)[0]}; there are --show and --dry-run, all else is key=value")
    words = [word for word in arguments if word not in flags]
    if not words:
        raise ConfigError("which configuration? Those that ship are in the folder configs")
    config = load_config(kind, words[0], words[1:])
    if "--show" in flags:
        print(dump_config(config))
        return
    if dry := "--dry-run" in flags:
        config = config.model_copy(update={"train": config.train.model_copy(update={"trackers": []})})
    work(config, dry)
    weights = config.out / "model"
    if not dry and distributed.world().rank == 0 and weights.is_dir():  # now that the numbers are known
        write_card(checkpoints.load(weights), weights, card(config.out))


def script(main: Callable[[list[str]], None]) -> None:
    """Run a script's ``main`` on the command line; what goes wrong ends in one line, output nobody reads in none."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes when it ends
        sys.exit(1)
    except (ConfigError, ValueError, OSError, FloatingPointError, UnusableData, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except train.Interrupted as stopped:
        sys.exit(str(stopped) if distributed.world().rank == 0 else 1)
    except KeyboardInterrupt:  # while packing or evaluating; whatever is written is written whole or not at all
        if distributed.world().rank == 0:
            print("stopped; the same command continues", file=sys.stderr, flush=True)
        os._exit(130)  # another process may never answer again, and a normal exit would wait for it


def finished(config: RunConfig) -> bool:
    """Whether this very run has ended before; says so."""
    # An evaluation may have left a report in the folder of a run that was stopped before it told what it measured.
    ended = all((config.out / name).exists() for name in ("config.yaml", "model", "report.html"))
    if ended:
        distributed.main_first(partial(train.claim, config.out, config))
        check_data(config.out)
        if distributed.world().rank == 0:
            print(f"{config.out} is finished: {config.out / 'report.html'}")
    return ended


def prepare(config: RunConfig, streams: Iterable[StreamConfig | None], evaluated: Iterable[Path]) -> None:
    """The run folder, the shards of a corpus and the indexes of tars that have none; the first process does it for all.

    Prints the configuration.

    Raises:
        FileNotFoundError: shards that are learned from or evaluated on are not there; better now than at the end.
        ConfigError: the run has learned from other data.
    """

    def work() -> None:
        known = config.out / LEARNED_FROM
        if not train.started(config.out):
            known.unlink(missing_ok=True)
        train.claim(config.out, config)
        check_data(config.out)  # the run is what is wrong with a table that was edited, more than the shards
        probe.note_commit(config.out)
        if config.corpus is not None:
            pack(config.corpus)
        learned = [folder for stream in filter(None, streams) for found in locate(stream).values() for folder in found]
        for folder in (*learned, *evaluated):
            Shards(folder)
        check_data(config.out)
        if not known.exists():
            tables = config.corpus.files.get("train", []) if config.corpus else []
            files = [*tables, *(Path(folder) / INDEX for folder in learned)]
            hub.write_atomically(known, json.dumps({str(file): hub.sha256(file) for file in files}, indent=2))

    distributed.main_first(work)
    if distributed.world().rank == 0:
        print(dump_config(config))


def check_data(out: Path) -> None:
    """Whether what a run learned from is still the same; what is no longer there cannot have changed.

    Raises:
        ConfigError: it is not; names the table or the folder of shards.
    """
    known = out / LEARNED_FROM
    for name, digest in (json.loads(known.read_text()) if known.exists() else {}).items():
        file = Path(name)
        if file.is_file() and hub.sha256(file) != digest:
            other = file.parent if file.name == INDEX else file
            raise ConfigError(f"{out} was trained on another {other}; remove that run, or choose another out=")


def keep(model: Pretrained, processor: Processor, folder: Path) -> None:
    """Weights and their processor, for ``from_pretrained``, in a folder of the run; the first process writes it."""
    if distributed.world().rank == 0:
        model.save_pretrained(folder, card=card(folder.parent))
        processor.save_pretrained(folder)


def card(out: Path) -> Card:
    """What a run's folder tells by now of the weights in it: what they saw, how they were made, what was measured."""
    facts, numbers, when = {}, {}, "At the end of the run"
    for file in sorted(out.glob("results*.json")):
        result = json.loads(file.read_text())
        facts |= {key: result[key] for key in FACTS if key in result}
        numbers |= {key.replace("/trained/", "/"): value for key, value in result.items() if "/trained/" in key}
        numbers |= {f"{result.get('split')}/{key}": value for key, value in result.get("numbers", {}).items()}
    if not numbers and (lines := runlog.read_log(out, "validation.jsonl")):
        when, numbers = f"At step {lines[-1].pop('step')}", lines[-1]
    if not facts and (commits := out / "commits.txt").exists():
        facts = {"commit": ", ".join(commits.read_text().split())}
    measured = []
    for key, value in numbers.items():
        place, _, measure = key.rpartition("/")
        if isinstance(value, float) and "chance" not in measure:
            chance = numbers.get(f"{place}/chance_{measure}")
            measured.append([place, measure, f"{value:.3f}", "" if chance is None else f"{chance:.3f}"])
    seen = next((line["seen"] for line in reversed(runlog.read_log(out)) if "seen" in line), {})
    counts = []
    for name, count in sorted(seen.items()):  # stream/source/what
        stream, _, rest = name.partition("/")
        source, _, what = rest.rpartition("/")
        counts.append([stream, source, what, f"{count:,}"])
    results = table(["slice", "measure", "value", "chance"], measured)
    config = (out / "config.yaml").read_text().strip()
    origin = ["A training run, with this configuration:", f"```yaml\n{config}\n```"]
    return Card(
        origin="\n\n".join([table(["", ""], [[*fact] for fact in facts.items()])] * bool(facts) + origin),
        data=f"Seen in training:\n\n{table(['stream', 'source', 'what', 'times'], counts)}" if counts else "",
        datasets=tuple(sorted({source for _, source, _, _ in counts})),
        numbers=f"{when}, on held-out records:\n\n{results}" if measured else "",
    )


def dry_folder() -> Path:
    """A temporary folder, the same for all processes."""
    mine = tempfile.mkdtemp(prefix="xvlm-dry-run-") if distributed.world().rank == 0 else ""
    return Path(distributed.gather_objects(mine)[0])
