"""Vectors of pictures and boxes: embed."""

from pathlib import Path
from typing import Annotated

import typer

from xvlm import hub
from xvlm.commands import DEFAULT
from xvlm.prose import counted

app = typer.Typer()


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, and folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Where the vectors go: .npz or .parquet.")] = Path("vectors.npz"),
    boxes: Annotated[Path | None, typer.Option(help='Boxes of them: {"image": …, "boxes_xyxy": …} a line.')] = None,
    model: Annotated[str, typer.Option(help="Folder, shipped name or hub name.")] = DEFAULT,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Write unit vectors of pictures and of boxes in them; pictures that cannot be read are named (status 1)."""
    import torch

    from xvlm import embed as embedding
    from xvlm.data.processor import Processor
    from xvlm.models.xvlm import XVLM

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it here: {str(error).splitlines()[0]}") from None
    write, images = embedding.writer_for(out), embedding.find_images(paths)
    asked = embedding.read_boxes(boxes, images) if boxes is not None else {}
    folder = hub.locate(model)
    loaded, processor = XVLM.from_pretrained(folder).to(device), Processor.from_pretrained(folder)
    vectors = embedding.embed(loaded, processor, images, asked, batch_size=batch_size, progress=True)
    write(vectors, model, out)
    for line in vectors.skipped:
        typer.echo(f"skipped {line}")
    count = len(images) - len(vectors.skipped)
    read = f"{counted(count, 'image')}, {counted(len(vectors.ids) - count, 'box', 'boxes')}"
    skipped = f"; {counted(len(vectors.skipped), 'image')} skipped" if vectors.skipped else ""
    typer.echo(f"{out}: {read}, vectors of {vectors.vectors.shape[1]}{skipped}")
    raise typer.Exit(1 if vectors.skipped else 0)
