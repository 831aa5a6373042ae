"""Pictures of what a model sees: boxes with labels, heat maps, contact sheets, training curves."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from xvlm.types import Grounded

if TYPE_CHECKING:  # drawn with where curves and histograms are, and nowhere else
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")
TRUE_COLOUR = "#ffffff"

Edges = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the canvas


class _Mark(NamedTuple):
    box: Edges
    label: str
    colour: str
    dashed: bool


def draw(
    image: Image.Image,
    found: Grounded | Float[Tensor, "box 4"],
    labels: Sequence[str] = (),
    *,
    true_xyxy: Float[Tensor, "true 4"] | None = None,
    true_labels: Sequence[str] = (),
    top: int = 5,
    colours: Sequence[str] = COLOURS,
    least_side: int = 480,
) -> Image.Image:
    """Draw boxes (and masks, where a grounding has them) on a copy of an image.

    Args:
        image: boxes are ``xyxy`` in its pixels.
        found: solid boxes, best first; of a :class:`Grounded` only the ``top`` best, labelled unless labels are given:
            several with their scores, one with its phrase.
        labels: one for each box drawn, or none.
        true_xyxy: boxes known to be right, dashed and white; ``true_labels``: one for each, or none.
        colours: taken in turns by the solid boxes.
        least_side: a smaller image is enlarged until its longer side has this many pixels, so that labels are legible.

    Raises:
        ValueError: neither no labels nor one for each box.
    """
    boxes_xyxy = found
    if isinstance(found, Grounded):
        boxes_xyxy = found.boxes_xyxy[:top]
        several = len(boxes_xyxy) > 1  # else there is nothing that a score tells it from
        labels = labels or [f"{s:.2f}" if several else found.phrase for s in found.scores[:top].tolist()]
    canvas, scale = _enlarged(image.convert("RGB"), least_side)
    if isinstance(found, Grounded) and found.masks is not None:
        for i, mask in enumerate(found.masks[:top]):
            shape = Image.fromarray(mask.cpu().numpy()).convert("L").resize(canvas.size).point(lambda v: v * 0.4)
            canvas.paste(Image.new("RGB", canvas.size, colours[i % len(colours)]), mask=shape)
    chosen = [colours[i % len(colours)] for i in range(len(boxes_xyxy))]
    marks = _marks(boxes_xyxy, labels, chosen, scale, dashed=False)
    if true_xyxy is not None:
        marks += _marks(true_xyxy, true_labels, [TRUE_COLOUR] * len(true_xyxy), scale, dashed=True)
    pen = ImageDraw.Draw(canvas)
    width = max(3, max(canvas.size) // 160)
    for mark in reversed(marks):  # the best one on top
        _outline(pen, mark, width)
    return _with_labels(canvas, marks)


def numbered(
    image: Image.Image, things: Sequence[tuple[str, Sequence[Edges]]], most: int = 8
) -> tuple[Image.Image, str]:
    """Draw the boxes of several things with a number each, and say below which is which.

    Args:
        things: what each is, and its ``xyxy`` boxes, none or several.
        most: of the things; the legend says how many more there are.

    Returns:
        The picture and its legend, a line for each thing.
    """
    drawn = [(i, box) for i, (_, boxes) in enumerate(things[:most]) for box in boxes]
    boxes_xyxy = torch.tensor([box for _, box in drawn]).reshape(-1, 4)
    colours = [COLOURS[i % len(COLOURS)] for i, _ in drawn] or COLOURS
    picture = draw(image, boxes_xyxy, [str(i + 1) for i, _ in drawn], colours=colours)
    legend = [f"{i + 1 if boxes else '-'} {text}" for i, (text, boxes) in enumerate(things[:most])]
    if len(things) > most:
        legend.append(f"and {len(things) - most} more")
    return picture, "\n".join(legend)


def heatmap(image: Image.Image, values: Float[Tensor, "height width"], colours: str = "inferno") -> Image.Image:
    """Lay a map of any resolution (attention, similarity) over an image, from its least (dark) to its most (bright).

    The photograph is turned grey, so that every colour is the map's; a map of one value all over is shown as its least.
    """
    from matplotlib import colormaps

    values = values.detach().float().cpu()
    spread = (values - values.min()) / (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
    spread = torch.nn.functional.interpolate(spread[None, None], image.size[::-1], mode="bilinear")[0, 0]
    coloured = Image.fromarray(colormaps[colours](spread.numpy(), bytes=True)).convert("RGB")
    return Image.blend(image.convert("L").convert("RGB"), coloured, 0.55)


def heat_of_words(
    image: Image.Image, phrases: Sequence[tuple[str, Sequence[tuple[str, Float[Tensor, "_ _"]]]]], *, width: int = 220
) -> Image.Image:
    """A row for each phrase: the image, then a heat map for each of its words, with the word's share of all the heat.

    Each map has its own scale: what a word's share is small of may still be seen.
    """
    longest = max(len(maps) for _, maps in phrases)
    blank = Image.new("RGB", image.size, "white")
    pictures, captions = [], []
    for phrase, maps in phrases:
        total = sum(float(heat.sum()) for _, heat in maps) or 1.0
        unused = longest - len(maps)
        pictures += [image, *(heatmap(image, heat) for _, heat in maps), *[blank] * unused]
        captions += [phrase, *(f"{word} {float(heat.sum()) / total:.0%}" for word, heat in maps), *[""] * unused]
    return contact_sheet(pictures, captions, longest + 1, width=width)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, *, width: int = 320, letters: int = 12
) -> Image.Image:
    """Pictures in rows, each ``width`` pixels wide with its wrapped caption below.

    Args:
        letters: their least height in pixels.

    Raises:
        ValueError: no images, or another number of captions than images.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"expected images and a caption for each, found {len(images)} and {len(captions)}")
    margin, font = 12, ImageFont.load_default(max(letters, width // 20))
    line = round(font.size * 1.3)
    scaled = [image.convert("RGB").resize((width, max(1, width * image.height // image.width))) for image in images]
    wrapped = [_wrap(caption, font, width) for caption in captions]
    columns = min(columns, len(images))
    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    heights = [max(scaled[i].height + 6 + line * len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new(
        "RGB", (columns * (width + margin) + margin, sum(heights) + margin * (len(rows) + 1)), color="white"
    )
    pen, y = ImageDraw.Draw(sheet), margin
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = margin + column * (width + margin)
            sheet.paste(scaled[i], (x, y))
            for n, text in enumerate(wrapped[i]):
                pen.text((x, y + scaled[i].height + 6 + n * line), text, fill="#222222", font=font)
        y += height + margin
    return sheet


def curves(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, x: str = "step") -> bytes:
    """A PNG with one small plot per key: the values as logged, pale, and their running mean.

    Args:
        rows: the log, one mapping a line; a row without a key is no point of that key's plot.
        keys: what to plot; ``x``: the key of the horizontal axis.

    Raises:
        ValueError: no keys, or one that no row has.
    """
    if not keys:
        raise ValueError("no keys to plot")
    figure, places = _small_plots(len(keys))
    for key, axes in zip(keys, places, strict=True):
        points = [(row[x], row[key]) for row in rows if key in row and x in row]
        if not points:
            raise ValueError(f"no row of the log has both {x!r} and {key!r}")
        at, values = zip(*points, strict=True)
        axes.plot(at, values, color="#56b4e9", alpha=0.4, linewidth=1, marker="." if len(points) == 1 else "")
        axes.plot(at, _running_mean(values), color="#1f8fd6", linewidth=2)
        axes.set_title(key, color="#888888", fontsize=11)
        axes.set_xlabel(x, color="#888888", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _as_png(figure)


def histograms(values: Mapping[str, Sequence[int | float]]) -> bytes:
    """A PNG with one small histogram per title.

    Raises:
        ValueError: nothing to draw, or a title without values.
    """
    if not values or not all(map(len, values.values())):
        raise ValueError("no values to plot")
    figure, places = _small_plots(len(values))
    for (title, each), axes in zip(values.items(), places, strict=True):
        whole = all(float(value).is_integer() for value in each)
        bins = [edge - 0.5 for edge in range(int(min(each)), int(max(each)) + 2)] if whole else 40
        axes.hist(each, bins, color="#56b4e9")
        axes.set_title(title, color="#888888", fontsize=11)
    return _as_png(figure)


def _small_plots(count: int) -> tuple["Figure", list["Axes"]]:
    """A figure of plots in rows of three, grey on nothing: readable on light and on dark pages."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    figure.patch.set_alpha(0)
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places[:count]:
        axes.patch.set_alpha(0)
        axes.tick_params(colors="#888888", labelsize=9)
        axes.grid(color="#888888", alpha=0.25)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_color("#888888")
            spine.set_visible(side in ("left", "bottom"))
    for axes in places[count:]:
        axes.set_visible(False)
    return figure, places[:count]


def _as_png(figure: "Figure") -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the run, centred; shorter at the ends."""
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _enlarged(image: Image.Image, least_side: int) -> tuple[Image.Image, float]:
    scale = max(1.0, least_side / max(image.size))
    size = round(image.width * scale), round(image.height * scale)
    return (image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image.copy()), scale


def _marks(
    boxes_xyxy: Float[Tensor, "box 4"], labels: Sequence[str], colours: Sequence[str], scale: float, dashed: bool
) -> list[_Mark]:
    if labels and len(labels) != len(boxes_xyxy):
        raise ValueError(f"expected no labels or one for each of the {len(boxes_xyxy)} boxes, found {len(labels)}")
    edges = [tuple(box) for box in (boxes_xyxy.float() * scale).tolist()]
    texts = labels or [""] * len(edges)
    return [_Mark(box, text, colour, dashed) for box, text, colour in zip(edges, texts, colours, strict=True)]


def _outline(pen: ImageDraw.ImageDraw, mark: _Mark, width: int) -> None:
    """A coloured line between two dark ones: seen on any background."""
    left, top, right, bottom = mark.box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    pen.line(corners, fill="#000000", width=width + 2, joint="curve")
    if not mark.dashed:
        pen.line(corners, fill=mark.colour, width=width, joint="curve")
        return
    dash = 5 * width
    for (x0, y0), (x1, y1) in pairwise(corners):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for start in range(0, round(length), 2 * dash):
            a, b = start / length, min(1, (start + dash) / length)
            ends = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)]
            pen.line(ends, fill=mark.colour, width=width)


def _with_labels(canvas: Image.Image, marks: Sequence[_Mark]) -> Image.Image:
    """Labels on translucent plates at their boxes, out of each other's way where there is room."""
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(layer), ImageFont.load_default(max(16, max(canvas.size) // 28))
    pad, taken, boxes = max(3, int(font.size) // 5), [], [mark.box for mark in marks]
    for mark in marks:
        if not mark.label:
            continue
        text = _shortened(mark.label, font, canvas.width - 2 * pad)
        size = font.getlength(text) + 2 * pad, font.size * 1.25 + pad
        plate = _place(mark.box, size, canvas.size, taken, boxes)
        taken.append(plate)
        red, green, blue = ImageColor.getrgb(mark.colour)[:3]
        pen.rounded_rectangle(plate, radius=pad, fill=(red, green, blue, 210))
        ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#ffffff"
        pen.text((plate[0] + pad, plate[1] + pad / 2), text, fill=ink, font=font)
    return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def _place(
    box: Edges, size: tuple[float, float], canvas: tuple[int, int], taken: Sequence[Edges], boxes: Sequence[Edges]
) -> Edges:
    """Where a plate goes: around its box, else inside; the first place with the least of plates and boxes under it.

    What counts is the share of a box that is covered, so that small things stay visible.
    """
    (left, top, right, bottom), (w, h) = box, size
    around = [(left, top - h), (right - w, top - h), (right, top), (left - w, top), (left, bottom), (right - w, bottom)]
    inside = [(left, top), (right - w, top), (left, bottom - h), (right - w, bottom - h)]
    corners = [(min(max(x, 0.0), canvas[0] - w), min(max(y, 0.0), canvas[1] - h)) for x, y in around + inside]

    def covered(plate: Edges) -> float:
        plates = sum((_overlap(plate, other) / (w * h) for other in taken), 0.0)
        return 4 * plates + sum(_overlap(plate, other) / max(_overlap(other, other), 1.0) for other in boxes)

    return min(((x, y, x + w, y + h) for x, y in corners), key=covered)


def _overlap(a: Edges, b: Edges) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
        lines.append(line)
    return [_shortened(line, font, width) for line in lines]
