"""Pre-train a multi-grained model: ``accelerate launch pretrain/train.py CONFIG [key=value …] [--show | --dry-run]``.

Packs the corpus if it is not packed, evaluates the untrained model, trains (or continues), evaluates again, and leaves
weights, ``results.json`` and ``report.html`` in the run folder. The same command continues a run that was interrupted.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator

from xvlm import distributed, hub, probe, train
from xvlm.config import ConfigError, Configured, dump_config, load_config
from xvlm.data import pretrain, scenes
from xvlm.data.pack import CorpusConfig, pack
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.words import WordMasking
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.xvlm import XVLM, XVLMConfig
from xvlm.optim import OptimConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.train import TrainConfig


class PretrainRun(Configured):
    """Everything a pre-training run depends on."""

    out: Path
    title: str = "Pre-training"
    corpus: CorpusConfig | None = None  # packed first; the streams then read <corpus.out>/<split>
    tokenizer: str  # "scenes", or a folder or name of a BERT-family tokenizer
    processor: ProcessorConfig = ProcessorConfig()
    model: XVLMConfig
    init: InitConfig = InitConfig()
    streams: dict[Literal["caption", "region"], pretrain.StreamConfig | None]  # null: left out
    masking: WordMasking = WordMasking()
    task: PretrainingConfig = PretrainingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: probe.ProbeConfig = probe.ProbeConfig()

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
    flags = {word for word in arguments if word.startswith("--")}
    if unknown := flags - {"--show", "--dry-run"}:
        raise ConfigError(f"unknown option {sorted(unknown)[0]}; there are --show and --dry-run, all else is key=value")
    words = [word for word in arguments if word not in flags]
    if not words:
        raise ConfigError("which configuration? For example configs/pretrain/demo.yaml")
    config = load_config(PretrainRun, words[0], words[1:])
    if "--show" in flags:
        print(dump_config(config))
        return
    run(config, dry_run="--dry-run" in flags)


def run(config: PretrainRun, *, dry_run: bool = False) -> None:
    if dry_run:
        config = config.model_copy(update={"train": config.train.model_copy(update={"trackers": []})})
    accelerator = train.make_accelerator(config.train, config.out, all_heads=uses_all_heads(config))
    config = dry(config) if dry_run else config
    keep_groups_whole(config)
    if finished(config):
        return
    started = time.time() - train.seconds_so_far(config.out)
    distributed.main_first(partial(prepare, config))
    torch.manual_seed(config.train.seed)
    processor = make_processor(config)
    model, fresh = initial_model(config.model, config.init)
    model.to(accelerator.device)
    before = untrained(config, model, processor)
    world = distributed.world()

    def open_stream(stream: pretrain.StreamConfig, start: int):
        place = {"seed": config.train.seed, "start": start, "rank": world.rank, "world": world.size}
        place["turns"] = config.train.accumulate
        return pretrain.loader(stream, processor, config.masking, **place)

    streams = {name: partial(open_stream, stream) for name, stream in config.streams.items() if stream is not None}
    task = Task(config.task, model)
    fresh = [f"model.{name}" for name in fresh]
    train.fit(task, streams, config.train, config.optim, config.out, accelerator, fresh=fresh)
    if world.rank == 0:
        model.save_pretrained(config.out / "model")
        processor.save_pretrained(config.out / "model")
    after, answered = probe.probe(model, processor, config.evaluation)
    if world.rank == 0:
        about = probe.facts(config.out, config.train.seed, (time.time() - started) / 60, accelerator.device)
        for table in probe.write(config.out, config.title, before, after, answered, config.evaluation, about):
            print(f"\n{probe.as_text(table)}")
        print(f"\n{config.out / 'report.html'}")


def finished(config: PretrainRun) -> bool:
    """Whether this very run has ended before; says so."""
    ended = (config.out / "config.yaml").exists() and (config.out / "report.html").exists()
    if ended:
        distributed.main_first(partial(train.claim, config.out, config))
        if distributed.world().rank == 0:
            print(f"{config.out} is finished: {config.out / 'report.html'}")
    return ended


def prepare(config: PretrainRun) -> None:
    """The run folder and, where there is a corpus, its shards."""
    train.claim(config.out, config)
    probe.note_commit(config.out)
    if config.corpus is not None:
        pack(config.corpus)


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


def untrained(config: PretrainRun, model: XVLM, processor: Processor) -> dict[str, probe.Numbers]:
    """The numbers of the model as it starts; kept in the run folder, for a run that is continued."""
    if not config.evaluation.untrained:
        return {}
    file = config.out / "untrained.json"
    if known := distributed.gather_objects(json.loads(file.read_text()) if file.exists() else None)[0]:
        return known
    numbers, _ = probe.probe(model, processor, config.evaluation)
    if distributed.world().rank == 0:
        hub.write_atomically(file, json.dumps(numbers, indent=2))
    return numbers


def dry(config: PretrainRun) -> PretrainRun:
    """The same run in miniature: a few generated scenes, two steps, everything written to a temporary folder."""
    mine = tempfile.mkdtemp(prefix="xvlm-dry-run-") if distributed.world().rank == 0 else ""
    out = Path(distributed.gather_objects(mine)[0])
    size = config.model.vision.image_size[0]
    corpus = CorpusConfig(
        reader="scenes", out=out / "shards", splits={"train": 16, "test": 8}, scenes=scenes.SceneConfig(size=size)
    )
    streams = {
        name: stream.model_copy(
            update={
                "shards": [out / "shards/train"],
                "images": 4 * distributed.world().size * config.train.accumulate,
                "kinds": ["region"],
            }
        )
        for name, stream in config.streams.items()
        if stream is not None
    }
    evaluation = config.evaluation.model_copy(update={"slices": {"dry": probe.Slice(shards=out / "shards/test")}})
    steps = config.train.model_copy(update={"steps": 2, "save_every": 1, "log_every": 1})
    return config.model_copy(
        update={"out": out, "corpus": corpus, "streams": streams, "evaluation": evaluation, "train": steps}
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, ValueError, OSError, FloatingPointError, pretrain.UnusableData) as error:
        sys.exit(f"error: {error}")
    except train.Interrupted as stopped:
        sys.exit(str(stopped))
    except KeyboardInterrupt:  # while packing or evaluating; whatever is written is written whole or not at all
        if distributed.world().rank == 0:
            print("stopped; the same command continues", file=sys.stderr, flush=True)
        os._exit(130)  # another process may never answer again, and a normal exit would wait for it
