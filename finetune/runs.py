"""What fine-tuning and evaluating share: a run's configuration, its model, its predictions and their numbers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from recipes import RECIPES, Recipe, TaskConfig
from torch import nn
from views import by_slice

from xvlm import hub, presence, probe, report
from xvlm.config import ConfigError, Configured, merge
from xvlm.data.processor import Processor
from xvlm.data.proposals import Source
from xvlm.data.readers import csv_table
from xvlm.data.shards import Shards
from xvlm.data.stream_config import StreamConfig, locate
from xvlm.models.init import InitConfig, initial_model, pretrained_model
from xvlm.models.lora import LoraConfig, adapt
from xvlm.models.xvlm import XVLM
from xvlm.prose import counted
from xvlm.run import RunConfig, packed_to, reading

Count = Annotated[int, Field(ge=1)]
SLICES = {
    "words": "words: by the words of the text (xvlm/metrics/slices.py).",
    "tag": "tag: as the data says.",
    "kind": "kind: as the data says.",
    "object": "object: by the true box, as above.",
}
READERS = {".csv": "csv_table", ".json": "coco_json", ".jsonl": "json_lines"}  # of files of one's own, by their ending


class EvaluationConfig(Configured):
    splits: dict[str, Path] = {}  # name -> folder of shards
    records: Count | None = None  # of each split, the first ones; null: all
    batch_size: Count = 32  # images
    untrained: bool = True  # also measure the model as it starts
    proposals: Source = "none"  # boxes that weakly supervised grounding chooses among
    # Grounding: the split on which the trained model learns how sure to be that a phrase is in the image at all.
    calibrate: str | None = None

    @model_validator(mode="after")
    def calibrates_on_a_split(self) -> "EvaluationConfig":
        if self.calibrate is not None and self.calibrate not in self.splits:
            raise ValueError(f"calibrate is {self.calibrate!r}; splits has {', '.join(self.splits) or 'none'}")
        return self


class RetentionConfig(Configured):
    """A task that the pre-trained weights know, to be asked again after they have learned another one."""

    task: TaskConfig
    shards: Path  # a packed folder of examples
    records: Count | None = None  # the first ones; null: all

    @model_validator(mode="after")
    def weights_may_know_the_task(self) -> "RetentionConfig":
        recipe = RECIPES[self.task.name]
        if recipe.model is not XVLM or recipe.looks > 1:
            raise ValueError(f"task {self.task.name}: pre-trained weights know retrieval and grounding")
        return self


class FinetuneRun(RunConfig):
    """Everything a fine-tuning run depends on."""

    title: str = "Fine-tuning"
    # Your own files instead of a corpus, by split: {train: my.csv}. They are packed to corpus.out, by default
    # <out>/shards. Without a `val`, it is the rows of train's table that its column `split` calls so, or without these
    # every tenth image of train.
    data: dict[str, Path] = {}
    task: TaskConfig
    init: InitConfig  # `model`: the pre-trained weights, whose shape and processor the task takes over
    from_scratch: bool = False  # of the pre-trained model take the shape alone: what pre-training is worth
    image_size: Count | None = None  # pixels; null: as in pre-training
    trunk_options: dict[str, Any] = {}  # over those of pre-training: Swin's window_size has to divide another size
    max_tokens: Count | None = None  # of a text; null: as in pre-training
    lora: LoraConfig | None = None  # the pre-trained layers stay as they are, and thin matrices beside them learn
    stream: StreamConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    retention: RetentionConfig | None = None  # what the model is to know still

    @model_validator(mode="before")
    @classmethod
    def own_files_make_a_corpus(cls, values: Any) -> Any:
        """``data`` says where the corpus, the stream and the splits are; what is said of these counts more."""
        data = values.get("data")
        if not isinstance(data, dict) or not data:
            return values
        if "train" not in data:
            raise ValueError("data: which file to train on? data.train=my.csv")
        if strange := [name for name in data if not name.startswith(("train", "val", "dev", "test"))]:
            raise ValueError(f"data: no split is called {', '.join(strange)}; names begin with train, val, dev or test")
        kinds = {Path(str(file)).suffix for file in data.values()}
        if len(kinds) > 1 or not kinds <= READERS.keys():
            found = ", ".join(map(str, data.values()))
            raise ValueError(f"data: found {found}; expected files that all end in one of {', '.join(READERS)}")
        match values:
            case {"corpus": {"out": out}}:
                shards = Path(str(out))
            case _:
                shards = Path(str(values.get("out"))) / "shards"
        splits = ["train", "val", *(split for split in data if split not in ("train", "val"))]
        table = Path(str(data["train"]))
        if "val" not in data and table.suffix == ".csv" and table.is_file() and "val" in csv_table.splits_of(table):
            data = data | {"val": data["train"]}
        corpus = {"reader": READERS[kinds.pop()], "files": data, "out": str(shards), "splits": dict.fromkeys(splits)}
        made = {
            "corpus": corpus,
            "stream": {"shards": [str(shards / "train")]},
            "evaluation": {"splits": {split: str(shards / split) for split in splits[1:]}},
        }
        return merge(made, values)

    @model_validator(mode="before")
    @classmethod
    def what_names_no_shards_reads_the_corpus(cls, values: Any) -> Any:
        """The stream ``train``, the retention ``test``; evaluated are all splits but ``train``."""
        packed = packed_to(values)
        if "train" in packed:
            values = reading(values, "stream", [packed["train"]])
        values = reading(values, "retention", packed.get("test"))
        match values:
            case {"evaluation": {"splits": _}}:
                return values
        return merge({"evaluation": {"splits": {split: packed[split] for split in packed if split != "train"}}}, values)

    @model_validator(mode="after")
    def the_stream_fits_the_task(self) -> "FinetuneRun":
        if self.stream.grain != self.recipe.grain:
            wanted = f"{self.task.name} learns from {self.recipe.grain!r}"
            raise ValueError(f"stream.grain is {self.stream.grain!r}; {wanted}")
        if self.evaluation.calibrate is not None and "itm_head" not in self.recipe.more_heads(self.task):
            raise ValueError("evaluation.calibrate is for grounding with a matching head: task.itm above 0")
        if self.init.model is None:
            raise ValueError("init.model: which pre-trained weights? A folder, or xvlm-scenes-tiny")
        if self.lora is not None and self.from_scratch:
            raise ValueError("lora adapts pre-trained weights, and from_scratch has none")
        if self.retention is not None and self.recipe.looks > 1:
            raise ValueError(
                f"retention: the layers of {self.task.name} look at two images, those of other tasks at one"
            )
        return self

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.task.name]


def build(config: FinetuneRun) -> tuple[nn.Module, list[str], Processor]:
    """The task, the names of its parameters that start fresh among pre-trained ones, and its processor."""
    recipe, name = config.recipe, config.init.model
    theirs, processor = pretrained_model(name).config, Processor.from_pretrained(name)
    size = theirs.vision.image_size if config.image_size is None else (config.image_size, config.image_size)
    options = theirs.vision.options | config.trunk_options
    vision = theirs.vision.model_copy(update={"image_size": size, "options": options})
    text = theirs.text.model_copy(update={"looks": max(recipe.looks, theirs.text.looks)})
    shape = theirs.model_copy(
        update={"heads": recipe.heads + recipe.more_heads(config.task), "vision": vision, "text": text}
    )
    pretrained, fresh = (XVLM(shape), []) if config.from_scratch else initial_model(shape, config.init)
    model, fresh = recipe.start(config.task, pretrained, fresh)
    if config.lora is not None:
        adapt(model, config.lora, fresh)
    tokens = config.max_tokens or processor.config.max_tokens
    prepared = {"image_size": size, "max_tokens": tokens, "end_token": recipe.end_token or processor.config.end_token}
    processor = Processor(processor.config.model_copy(update=prepared), processor.tokenizer)
    return recipe.task(config.task, model), [f"model.{part}" for part in fresh], processor


def load(config: FinetuneRun, name: Path | str) -> tuple[nn.Module, Processor]:
    """The task with the weights of a folder, and its processor."""
    return config.recipe.task(config.task, config.recipe.model.from_pretrained(name)), Processor.from_pretrained(name)


def shards_of(config: FinetuneRun, split: str) -> Shards:
    """The records of a split.

    Raises:
        ConfigError: there is no split of this name.
    """
    if split not in config.evaluation.splits:
        raise ConfigError(f"evaluation.splits has no {split!r}; it has {', '.join(config.evaluation.splits) or 'none'}")
    return Shards(config.evaluation.splits[split])


def asked_of(config: FinetuneRun, split: str) -> tuple[Shards, range]:
    """The records of a split, and which of them are asked."""
    shards = shards_of(config, split)
    return shards, range(min(len(shards), config.evaluation.records or len(shards)))


def trained_on(config: FinetuneRun) -> list[Path]:
    """The folders of shards that a run learns from."""
    return list(chain.from_iterable(locate(config.stream).values()))


def ask(
    config: FinetuneRun, split: str, task: nn.Module, processor: Processor, weights: Path | None = None
) -> list[Any]:
    """What a task answers to a split: a row for each example, on every process the same.

    Args:
        weights: the folder its weights are in, for what is stored with them; None while it trains.
    """
    shards, indices = asked_of(config, split)
    was_training = task.training
    task.eval()
    rows = config.recipe.ask(
        task,
        processor,
        shards,
        indices,
        batch_size=config.evaluation.batch_size,
        weights=weights,
        boxes_from=config.evaluation.proposals,
        trained_on=partial(trained_on, config),
    )
    task.train(was_training)
    return rows


def write_rows(file: Path, rows: Sequence[Any]) -> None:
    """JSON lines, a prediction each."""
    hub.write_atomically(file, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(config: FinetuneRun, file: Path) -> list[Any]:
    """Predictions that were written before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no prediction of this task; says which and why.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file of predictions; finetune/evaluate.py writes them")
    adapter, rows = TypeAdapter(config.recipe.row), []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(adapter.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{file} line {number}: {where}: {first['msg']} ({config.task.name})") from None
    return rows


def check_calibration(config: FinetuneRun) -> None:
    """Whether the split to calibrate on can teach anything; better known before training than after.

    Raises:
        ConfigError: all its expressions have a box.
    """
    if config.evaluation.calibrate is not None:
        shards = shards_of(config, config.evaluation.calibrate)
        if not any(said.box_xyxy is None for record in shards.records() for said in record.expressions):
            raise ConfigError(
                f"evaluation.calibrate: every expression in {shards.folder} has a box; some must name nothing"
            )


def calibrate(config: FinetuneRun, task: nn.Module, processor: Processor, folder: Path) -> None:
    """Store beside the weights how sure to be that a phrase is in the image; see :mod:`xvlm.presence`."""
    if config.evaluation.calibrate is None:
        return
    task.eval()
    records = asked_of(config, config.evaluation.calibrate)
    asked = presence.gather(task, task.model, processor, *records, config.evaluation.batch_size)
    presence.fit(*asked).save_pretrained(folder)


def facts(config: FinetuneRun, task: nn.Module, weights: Path) -> dict[str, Any]:
    """What else the answers of a task depend on."""
    return config.recipe.facts(task, weights=weights, boxes_from=config.evaluation.proposals)


def judge(config: FinetuneRun, split: str, rows: Sequence[Any], **made_with: Any) -> dict[str, Any]:
    """The numbers of a split with all that they depend on."""
    numbers = config.recipe.numbers(config.task, rows)
    return {
        "task": config.task.name,
        "split": split,
        "protocol": config.recipe.explain(numbers),
        "settings": config.task.model_dump(mode="json"),
        "data": fingerprint(config.evaluation.splits[split]),
        "commit": probe.commit(),
        **made_with,
        "examples": len(rows),
        "left_out": config.recipe.left_out(*asked_of(config, split)),
        "numbers": numbers,
        "chance": config.recipe.chance(rows, shards_of(config, split)),
        "slices": {view.headline: by_slice(view, rows) for view in config.recipe.views},
    }


def fingerprint(name: Path | str) -> dict[str, str]:
    """Which file or folder something was made from; of weights also a name that is shipped or on the hub."""
    return {"folder": str(name), "sha256": hub.digest(hub.locate(name))}


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The numbers of :func:`judge` (``untrained``: those of the model as it started), and those of its slices."""
    before = result.get("untrained")
    columns = {"trained" if before else "measured": result["numbers"], "untrained": before, "chance": result["chance"]}
    found = {name: column for name, column in columns.items() if column}
    rows = [[name, *(column.get(name) for column in found.values())] for name in result["numbers"]]
    title = f"{result['task']}, {result['split']}"
    examples = counted(result["examples"], "example")
    if left_out := result.get("left_out"):
        examples += f", {counted(left_out, 'text')} left out (several boxes of an image have the same one)"
    made = [report.Table(f"{title}: {examples}", ["", *found], rows, result["protocol"])]
    for headline, slices in result["slices"].items():
        rows = [[name, part["examples"], part[headline]] for name, part in slices.items()]
        if rows:
            notes = [note for kind, note in SLICES.items() if any(name.startswith(f"{kind}: ") for name in slices)]
            note = " ".join([*notes, "An example may be in several slices."])
            made.append(report.Table(f"{title}: slices", ["", "examples", headline], rows, note))
    return made if result["numbers"] else []
