"""What things cost on this machine: bench step, retrieval, data, memory."""

import json
from pathlib import Path
from typing import Annotated

import typer

from xvlm import hub
from xvlm.commands import DEFAULT

app = typer.Typer(no_args_is_help=True, help="What things cost on this machine.")


@app.command()
def step(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "small",
    images: Annotated[int, typer.Option(min=1, help="Images of the batch.")] = 4,
    texts_per_image: Annotated[int, typer.Option(min=1, help="The first about the image, the rest about regions.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: torch's own choice.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine; one thread.")] = "wall",
    peak_tflops: Annotated[float | None, typer.Option(help="Of the device, for MFU. Default: of known GPUs.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Time, memory and FLOPs of a pre-training step, beside the same step written the naive way."""
    from functools import partial

    import torch

    from xvlm.bench.step import bench_step
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_step(
        size,
        lambda model: partial(Task(PretrainingConfig(), model).losses, boxes=True),
        images=images,
        texts_per_image=texts_per_image,
        device=device,
        precision=precision,
        repeats=repeats,
        clock=clock,
        peak_tflops=peak_tflops,
    )
    _report(result, json_file)


@app.command()
def retrieval(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "small",
    images: Annotated[int, typer.Option(min=1, help="Of the gallery.")] = 16,
    texts_per_image: Annotated[int, typer.Option(min=1, help="Of the gallery.")] = 5,
    top_k: Annotated[int, typer.Option(min=1, help="How many candidates of a query are re-ranked.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: torch's own choice.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine; one thread.")] = "wall",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Time and FLOPs of re-ranking a gallery both ways, beside the same done a query at a time."""
    import torch

    from xvlm.bench.retrieval import bench_retrieval

    if threads is not None:
        torch.set_num_threads(threads)
    result = bench_retrieval(
        size,
        images=images,
        texts_per_image=texts_per_image,
        top_k=top_k,
        device=device,
        repeats=repeats,
        clock=clock,
    )
    _report(result, json_file)


@app.command()
def data(
    shards: Annotated[Path | None, typer.Argument(help="A packed folder. Default: photographs made here.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many, at most; whole batches are read.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 32,
    size: Annotated[int, typer.Option(min=1, help="Height and width that a model wants.")] = 224,
    tokenizer: Annotated[str, typer.Option(help="Folder, shipped name or hub name of the words.")] = DEFAULT,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine.")] = "wall",
    made: Annotated[tuple[int, int], typer.Option(help="Width and height of the photographs made here.")] = (640, 480),
    originals: Annotated[
        Path | None, typer.Option(help="The same records packed with larger images: the plain way reads these.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Samples a core reads, decodes and augments per second, beside the same images by Pillow and torchvision."""
    import torch

    from xvlm.bench.data import bench_data
    from xvlm.data.processor import Processor, ProcessorConfig

    torch.set_num_threads(1)
    processor = Processor.from_tokenizer(hub.locate(tokenizer), ProcessorConfig(image_size=size))
    asked = {"images": images, "batch": batch, "repeats": repeats, "clock": clock, "made": made}
    asked["originals"] = originals
    result = bench_data(shards, processor, **asked)
    _report(result, json_file)


@app.command()
def memory(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "base",
    device: Annotated[str, typer.Option(help="cuda or cuda:N measures; cpu counts tensors.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "bf16",
    batches: Annotated[tuple[int, int], typer.Option(help="Images of the two batches to go by.")] = (4, 8),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Memory of a pre-training update, and the largest batch on cards of 12, 24, 48 and 80 GB."""
    from xvlm.bench.memory import bench_memory
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    def task(model):
        return Task(PretrainingConfig(), model)

    result = bench_memory(size, task, device=device, precision=precision, batches=batches)
    _report(result, json_file)


def _report(result, json_file: Path | None) -> None:
    for line in result.lines():
        typer.echo(line)
    if json_file is not None:
        hub.write_atomically(json_file, json.dumps(result.json(), indent=2) + "\n")
