"""Pre-train a multi-grained model: ``accelerate launch pretrain/train.py CONFIG [key=value …] [--show | --dry-run]``.

Packs the corpus if it is not packed, evaluates the untrained model, trains (or continues), evaluates again, and leaves
weights, ``results.json`` and ``report.html`` in the run folder. The same command continues a run that was interrupted.
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

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
    streams: dict[str, pretrain.StreamConfig | None]  # null: left out
    masking: WordMasking = WordMasking()
    task: PretrainingConfig = PretrainingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: probe.ProbeConfig = probe.ProbeConfig()


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
    run(dry(config) if "--dry-run" in flags else config)


def run(config: PretrainRun) -> None:
    started = time.time() - train.seconds_so_far(config.out)
    accelerator = train.make_accelerator(config.train, config.out)
    with distributed.main_first():
        train.claim(config.out, config)
        if config.corpus is not None:
            pack(config.corpus)
    torch.manual_seed(config.train.seed)
    processor = make_processor(config)
    model, fresh = initial_model(config.model, config.init)
    model.to(accelerator.device)
    before = untrained(config, model, processor)
    world = distributed.world()

    def open_stream(stream: pretrain.StreamConfig, start: int):
        place = {"seed": config.train.seed, "start": start, "rank": world.rank, "world": world.size}
        return pretrain.loader(stream, processor, config.masking, **place)

    streams = {name: partial(open_stream, stream) for name, stream in config.streams.items() if stream is not None}
    task = Task(config.task, model)
    fresh = [f"model.{name}" for name in fresh]
    train.fit(task, streams, config.train, config.optim, config.out, accelerator, fresh=fresh)
    after, answered = probe.probe(model, processor, config.evaluation)
    if world.rank == 0:
        model.save_pretrained(config.out / "model")
        processor.save_pretrained(config.out / "model")
        about = probe.facts(config.train.seed, (time.time() - started) / 60)
        for table in probe.write(config.out, config.title, before, after, answered, config.evaluation, about):
            print(f"\n{probe.as_text(table)}")
        print(f"\n{config.out / 'report.html'}")


def make_processor(config: PretrainRun) -> Processor:
    if config.tokenizer == "scenes":
        return Processor.from_vocabulary(scenes.vocabulary(), config.processor)
    return Processor.from_tokenizer(hub.locate(config.tokenizer), config.processor)


def untrained(config: PretrainRun, model: XVLM, processor: Processor) -> dict[str, probe.Numbers]:
    """The numbers of the model as it starts; kept in the run folder, for a run that is continued."""
    if not config.evaluation.untrained:
        return {}
    file = config.out / "untrained.json"
    if file.exists():
        return json.loads(file.read_text())
    numbers, _ = probe.probe(model, processor, config.evaluation)
    if distributed.world().rank == 0:
        hub.write_atomically(file, json.dumps(numbers, indent=2))
    distributed.wait_for_everyone()
    return numbers


def dry(config: PretrainRun) -> PretrainRun:
    """The same run in miniature: a few generated scenes, two steps, everything written to a temporary folder."""
    out = Path(tempfile.mkdtemp(prefix="xvlm-dry-run-"))
    size = config.model.vision.image_size[0]
    corpus = CorpusConfig(
        reader="scenes", out=out / "shards", splits={"train": 16, "test": 8}, scenes=scenes.SceneConfig(size=size)
    )
    streams = {
        name: stream.model_copy(update={"shards": [out / "shards/train"], "images": 4 * distributed.world().size})
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
    except (ConfigError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except train.Interrupted as stopped:
        sys.exit(str(stopped))
