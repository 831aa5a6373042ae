"""Unit vectors of images and of boxes in them, for search: thousands of boxes per image, one file for all.

They are the contrastive features (ITC, X-VLM section 3.3): their products with those of texts are similarities.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import model_validator
from torch import Tensor
from tqdm import tqdm

from xvlm import boxes as geometry
from xvlm import hub
from xvlm.config import Configured, validate
from xvlm.data.images import READABLE, decode_image
from xvlm.data.processor import Processor
from xvlm.data.records import Box
from xvlm.models.vision import regions_in_pixels
from xvlm.models.xvlm import XVLM
from xvlm.prose import counted

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # of images in folders

NOWHERE: Box = (np.nan,) * 4  # the box of a whole image
Boxes = Mapping[str, Mapping[str, Box]]  # image -> id of a box -> box, xyxy in pixels of the stored image


class Line(Configured):
    """A line of a box file: boxes of one image, ``xyxy`` in pixels of the stored image, by number or with ids."""

    image: str
    boxes_xyxy: list[Box]
    ids: list[str | int] | None = None

    @model_validator(mode="after")
    def _an_id_each(self) -> "Line":
        if self.ids is not None and len(self.ids) != len(self.boxes_xyxy):
            raise ValueError(f"{counted(len(self.ids), 'id')} for {counted(len(self.boxes_xyxy), 'box', 'boxes')}")
        return self


@dataclass(frozen=True)
class Vectors:
    """A row for each image, behind it one for each of its boxes. ``skipped``: images that cannot be read, and why."""

    ids: list[str]
    images: list[str]
    boxes_xyxy: Float[np.ndarray, "row 4"]  # pixels of the stored image; NaN for whole images
    vectors: Float[np.ndarray, "row embed"]
    skipped: list[str]


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """Images by name: a file's name, or for those of a folder, and of folders in it, the path inside the folder.

    Raises:
        FileNotFoundError: no such path, or a folder without images.
        ValueError: two of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        root, inside = path.parent, [path]
        if path.is_dir():
            root, inside = path, sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"{path}: no images in this folder")
        for file in inside:
            name = file.relative_to(root).as_posix()
            if name in found:
                raise ValueError(f"{file} and {found[name]} are both called {name!r}; give the folder around both")
            found[name] = file
    return found


def read_boxes(file: Path, images: Mapping[str, Path]) -> Boxes:
    """The boxes in a file of JSON lines (:class:`Line`); those without ids are called NAME#0, NAME#1, … of their image.

    Raises:
        ValueError: a line that is not one, an image not among ``images``, an id for the second time, a box that leaves
            its image or is empty; names file and line.
    """
    found: dict[str, dict[str, Box]] = {}
    ids = set(images)
    with file.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                line = validate(Line, json.loads(text), where)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not readable as JSON: {error}") from None
            if line.image not in images:
                raise ValueError(f"{where}: no image is called {line.image!r}; there are {next(iter(images))!r}, …")
            _check_inside(line.boxes_xyxy, images[line.image], where)
            asked = found.setdefault(line.image, {})
            names = line.ids or [f"{line.image}#{len(asked) + i}" for i in range(len(line.boxes_xyxy))]
            for name, box in zip(map(str, names), line.boxes_xyxy, strict=True):
                if name in ids:
                    raise ValueError(f"{where}: {name!r} is the id of another box or image")
                ids.add(name)
                asked[name] = box
    return found


def _check_inside(boxes: list[Box], image: Path, where: str) -> None:
    try:
        with Image.open(image, formats=READABLE) as opened:
            size = opened.size
    except Exception:  # an image that cannot be read is skipped later, with its reason
        return
    _tensor(boxes, size, where)


def _tensor(boxes: Iterable[Box], size: tuple[int, int], where: object) -> Float[Tensor, "box 4"]:
    """Boxes of an image of a size (width, height), known to lie in it. In float64, for where they end on a patch."""
    made = torch.tensor(list(boxes), dtype=torch.float64).view(-1, 4)
    try:
        geometry.check_inside(made, *size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return made


@torch.inference_mode()
def embed(
    model: XVLM,
    processor: Processor,
    images: Mapping[str, Path],
    boxes: Boxes | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Vectors:
    """Vectors of images and of boxes in them; the trunk sees each image once.

    Args:
        batch_size: images at once. With ``local_layers`` memory grows with their boxes' patches, too.

    Raises:
        ValueError: a model without the projection, boxes of an image that is not given, a box that leaves its image or
            is empty, or no image can be read.
    """
    if "image_projection" not in model.config.heads:
        raise ValueError("the model has no image_projection, so its images cannot be compared with texts")
    device, size, names = next(model.parameters()).device, processor.config.image_size, list(images)
    boxes = boxes or {}
    if strangers := boxes.keys() - images.keys():
        raise ValueError(f"boxes of {sorted(strangers)[0]!r}, which is none of the images")
    rows, vectors, skipped = [], [], []
    for first in tqdm(range(0, len(names), batch_size), desc="embedding", unit="batch", disable=not progress):
        pixels, scaled = {}, []
        for name in names[first : first + batch_size]:
            try:
                picture = decode_image(images[name].read_bytes())
            except (ValueError, OSError) as error:
                skipped.append(f"{images[name]}: {error}")
                continue
            inside = _tensor(boxes.get(name, {}).values(), picture.size, images[name])
            pixels[name] = processor.pixel_values(picture)
            # Multiplied first: an edge in the middle of the image stays there.
            scaled.append(inside * torch.tensor([size[1], size[0]] * 2) / torch.tensor(picture.size * 2))
        if not pixels:
            continue
        counts = [len(each) for each in scaled]
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        regions = regions_in_pixels(torch.cat(scaled), image, size)
        concepts = model.encode_image(torch.stack(list(pixels.values())).to(device), regions.to(device))
        found = model.embed_image(concepts).float().cpu()
        for name, whole, parts in zip(pixels, found[: len(pixels)], found[len(pixels) :].split(counts), strict=True):
            rows += [(name, name, NOWHERE), *((i, name, box) for i, box in boxes.get(name, {}).items())]
            vectors += [whole[None], parts]
    if not rows:
        raise ValueError(f"of {counted(len(names), 'image')} none can be read: {'; '.join(skipped[:1])}")
    ids, of, where = zip(*rows, strict=True)
    return Vectors(list(ids), list(of), np.array(where), torch.cat(vectors).numpy(), skipped)


def writer_for(file: Path) -> Callable[[Vectors, str, Path], None]:
    """What writes vectors, with the model's name, to files of this name's ending, each whole or not at all.

    Raises:
        ValueError: another ending than ``.npz`` and ``.parquet``, or pyarrow is not installed, which the latter needs.
        FileNotFoundError: no folder to write to.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}")
    if file.suffix not in (".npz", ".parquet"):
        raise ValueError(f"{file}: expected a name that ends in .npz or .parquet")
    if file.suffix == ".npz":
        return _write_npz
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(f"{file}: needs pyarrow: pip install -e '.[parquet]'; .npz needs nothing") from None
    return _write_parquet


def _write_npz(vectors: Vectors, model: str, file: Path) -> None:
    with hub.replacing(file) as unfinished, unfinished.open("wb") as opened:
        np.savez(
            opened,
            ids=np.array(vectors.ids),
            images=np.array(vectors.images),
            boxes_xyxy=vectors.boxes_xyxy,
            vectors=vectors.vectors,
            model=np.array(model),
        )


def _write_parquet(vectors: Vectors, model: str, file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    no_box = np.isnan(vectors.boxes_xyxy[:, 0])
    columns = {
        "id": vectors.ids,
        "image": vectors.images,
        "box_xyxy": pyarrow.FixedSizeListArray.from_arrays(vectors.boxes_xyxy.ravel(), 4, mask=pyarrow.array(no_box)),
        "vector": pyarrow.FixedSizeListArray.from_arrays(vectors.vectors.ravel(), vectors.vectors.shape[1]),
    }
    with hub.replacing(file) as unfinished:
        parquet.write_table(pyarrow.table(columns, metadata={"model": model}), unfinished)
