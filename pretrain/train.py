"""Pre-train a multi-grained model: ``accelerate launch pretrain/train.py CONFIG [key=value …] [--show | --dry-run]``.

Packs the corpus if it is not packed, evaluates the untrained model, trains (or continues), evaluates again, and leaves
weights, ``results.json`` and ``report.html`` in the run folder. The same command continues a run that was interrupted.
"""

import json
import time
from functools import partial
from typing import Any, Literal

import torch
from pydantic import model_validator

from xvlm import distributed, hub, probe, runlog, train
from xvlm.config import ConfigError
from xvlm.data import scenes
from xvlm.data.pack import CorpusConfig
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import loader
from xvlm.data.words import WordMasking
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.xvlm import XVLMConfig
from xvlm.run import RunConfig, command, dry_folder, finished, keep, packed_to, prepare, reading, script
from xvlm.tasks.pretraining import PretrainingConfig, Task


class PretrainRun(RunConfig):
    """Everything a pre-training run depends on."""

    title: str = "Pre-training"
    tokenizer: str  # "scenes", or a folder or name of a BERT-family tokenizer
    processor: ProcessorConfig = ProcessorConfig()
    model: XVLMConfig
    init: InitConfig = InitConfig()
    streams: dict[Literal["caption", "region"], StreamConfig | None]  # null: left out
    masking: WordMasking = WordMasking()
    task: PretrainingConfig = PretrainingConfig()
    evaluation: probe.ProbeConfig = probe.ProbeConfig()

    @model_validator(mode="before")
    @classmethod
    def what_names_no_shards_reads_the_corpus(cls, values: Any) -> Any:
        """Of a stream ``train``, of a slice ``test``."""
        packed = packed_to(values)
        if "train" in packed:
            values = reading(values, "streams.*", [packed["train"]])
        return reading(values, "evaluation.slices.*", packed.get("test"))

    @model_validator(mode="after")
    def there_is_something_to_learn(self) -> "PretrainRun":
        streams = {name: stream for name, stream in self.streams.items() if stream is not None}
        for name, stream in streams.items():
            if stream.grain != name:
                raise ValueError(f"streams.{name}.grain is {stream.grain!r}; a stream is called what it is")
        if not streams:
            raise ValueError("streams: there is none; expected caption, region or both")
        if not any(self.task.weights.model_dump().values()):
            raise ValueError("task.weights: all of them are 0, so there is nothing to learn")
        return self


def main(arguments: list[str]) -> None:
    command(PretrainRun, run, arguments)


def run(config: PretrainRun, dry_run: bool) -> None:
    accelerator = train.make_accelerator(config.train, config.out, all_heads=uses_all_heads(config))
    config = dry(config) if dry_run else config
    keep_groups_whole(config)
    if finished(config):
        return
    started = time.time() - runlog.seconds_so_far(config.out)
    prepare(config, config.streams.values(), [each.shards for each in config.evaluation.slices.values()])
    torch.manual_seed(config.train.seed)
    processor = make_processor(config)
    model, fresh = initial_model(config.model, config.init)
    task = Task(config.task, model.to(accelerator.device))
    before = untrained(config, task, processor)
    world = distributed.world()

    def open_stream(stream: StreamConfig, start: int):
        place = {"seed": config.train.seed, "start": start, "rank": world.rank, "world": world.size}
        place["turns"] = config.train.accumulate
        return loader(stream, processor, config.masking, **place)

    streams = {name: partial(open_stream, stream) for name, stream in config.streams.items() if stream is not None}
    validation = runlog.Validation(partial(measure, config, task, processor), partial(keep, model, processor))
    fresh = [f"model.{name}" for name in fresh]
    train.fit(task, streams, config.train, config.optim, config.out, accelerator, fresh=fresh, validation=validation)
    keep(model, processor, config.out / "model")
    after, answered = probe.probe(task, processor, config.evaluation)
    if world.rank == 0:
        about = probe.facts(config.out, config.train.seed, (time.time() - started) / 60, accelerator.device)
        for table in probe.write(config.out, config.title, before, after, answered, config.evaluation, about):
            print(f"\n{probe.as_text(table)}")
        print(f"\n{config.out / 'report.html'}")


def measure(config: PretrainRun, task: Task, processor: Processor) -> dict[str, float]:
    """The numbers of every slice, as ``slice/measure``."""
    numbers, _ = probe.probe(task, processor, config.evaluation)
    return {f"{name}/{key}": value for name, row in numbers.items() for key, value in row.items()}


def uses_all_heads(config: PretrainRun) -> bool:
    """Whether every update trains every head."""
    weights = config.task.weights.model_dump().values()
    return config.train.recipe == "joint" and all(weights) and config.streams.get("region") is not None


def keep_groups_whole(config: PretrainRun) -> None:
    """Negatives are drawn within groups of images, so each group has to be on one process, in one turn."""
    among = config.task.negatives_among or 1
    for name, stream in config.streams.items():
        part = stream.images // (distributed.world().size * config.train.accumulate) if stream is not None else among
        if part % among:
            raise ConfigError(f"task.negatives_among is {among}, but a turn of streams.{name} has {part} images")


def make_processor(config: PretrainRun) -> Processor:
    if config.tokenizer == "scenes":
        processor = Processor.from_vocabulary(scenes.vocabulary(), config.processor)
    else:
        processor = Processor.from_tokenizer(hub.locate(config.tokenizer), config.processor)
    text = config.model.text
    if processor.vocab_size != text.vocab_size:
        raise ConfigError(f"model.text.vocab_size is {text.vocab_size}, the tokenizer has {processor.vocab_size} words")
    positions = text.max_positions - text.position_offset
    if config.processor.max_tokens > positions:
        raise ConfigError(
            f"processor.max_tokens is {config.processor.max_tokens}, model.text has {positions} positions"
        )
    return processor


def untrained(config: PretrainRun, task: Task, processor: Processor) -> dict[str, probe.Numbers]:
    """The numbers of the model as it starts; kept in the run folder, for a run that is continued."""
    if not config.evaluation.untrained:
        return {}
    file = config.out / "untrained.json"
    if known := distributed.gather_objects(json.loads(file.read_text()) if file.exists() else None)[0]:
        return known
    numbers, _ = probe.probe(task, processor, config.evaluation)
    if distributed.world().rank == 0:
        hub.write_atomically(file, json.dumps(numbers, indent=2))
    return numbers


def dry(config: PretrainRun) -> PretrainRun:
    """The same run in miniature: a few generated scenes, two steps, everything written to a temporary folder."""
    out = dry_folder()
    size = config.model.vision.image_size[0]
    corpus = CorpusConfig(
        reader="scenes", out=out / "shards", splits={"train": 16, "test": 8}, scenes=scenes.SceneConfig(size=size)
    )
    streams = {
        name: stream.model_copy(
            update={
                "shards": [str(out / "shards/train")],
                "sources": None,
                "images": 4 * distributed.world().size * config.train.accumulate,
                "kinds": ["region"],
            }
        )
        for name, stream in config.streams.items()
        if stream is not None
    }
    evaluation = config.evaluation.model_copy(update={"slices": {"dry": probe.Slice(shards=out / "shards/test")}})
    steps = config.train.model_copy(update={"steps": 2, "save_every": 1, "log_every": 1, "profile": None})
    if config.train.validate_every is not None:
        best = config.train.best and f"dry/{config.train.best.partition('/')[2]}"
        steps = steps.model_copy(update={"validate_every": 1, "best": best})
    return config.model_copy(
        update={"out": out, "corpus": corpus, "streams": streams, "evaluation": evaluation, "train": steps}
    )


if __name__ == "__main__":
    script(main)
