"""What re-ranking a gallery costs, beside the same done the naive way, in one run.

Both ways score the same candidates by the same weights: each image's most similar texts and each text's most similar
images. The naive way is X-VLM's (reference ``Retrieval.py:evaluation``): one query at a time, padded texts, the image's
tokens copied and projected for each pair, a pair that both directions ask for scored twice.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xvlm import evaluate
from xvlm.bench import measure
from xvlm.bench.naive import fuse_padded, read_padded
from xvlm.bench.step import SIZES, check, check_timing, make_batch
from xvlm.models.xvlm import XVLM
from xvlm.prose import counted
from xvlm.types import Concepts, Texts, Words


@dataclass(frozen=True)
class Result:
    """Seconds are medians: of encoding all images and texts, which is the same for both, and of re-ranking."""

    size: str
    images: int
    texts: int
    top_k: int
    device: str
    threads: int
    clock: str
    repeats: int
    pairs_asked: int  # by both directions together
    pairs_scored: int  # different ones
    encoding: float
    naive: float
    ours: float
    naive_flops: int
    flops: int
    score_difference: float  # largest, of matching logits

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.naive / self.ours}

    def lines(self) -> list[str]:
        """A table in Markdown, and what it is to be read against."""
        rows = [
            ("re-ranking, s", self.naive, self.ours),
            ("pairs scored", self.pairs_asked, self.pairs_scored),
            ("GFLOP", self.naive_flops / 1e9, self.flops / 1e9),
        ]
        gallery = f"{counted(self.images, 'image')}, {counted(self.texts, 'text')}"
        return [
            f"{self.size}; {gallery}, the best {self.top_k} of each re-ranked",
            f"{self.device}, {counted(self.threads, 'thread')}, {self.clock} time; medians of {self.repeats}",
            "",
            "| | naive | ours | ratio |",
            "| --- | --- | --- | --- |",
            *(f"| {name} | {a:,.4g} | {b:,.4g} | {a / b:.2f} |" for name, a, b in rows),
            "",
            f"same scores to {self.score_difference:.0e}; encoding images and texts: {self.encoding:,.4g} s either way",
        ]


@torch.inference_mode()
def bench_retrieval(
    size: str,
    *,
    images: int,
    texts_per_image: int,
    top_k: int,
    device: str,
    repeats: int,
    clock: str = "wall",
) -> Result:
    """Measure re-ranking with a model of a named size and fresh weights, on noise.

    Raises:
        ValueError: as :func:`xvlm.bench.step.bench_step`.
    """
    place = check(size, device, "fp32")
    check_timing(device, clock, images * texts_per_image)
    torch.manual_seed(0)
    model = XVLM(SIZES[size]).to(place).eval()
    batch = make_batch(SIZES[size], images, texts_per_image, torch.Generator().manual_seed(0)).to(place)
    seconds = measure.stopwatch(place, clock)

    def timed(work):
        begun = seconds()
        found = work()
        return seconds() - begun, found

    encoding, (gallery, words) = timed(lambda: (model.encode_image(batch.images), model.encode_text(batch.texts)))
    ways = {
        "naive": lambda: rank_naively(model, gallery, batch.texts, top_k),
        "ours": lambda: evaluate.rank(model, gallery, words, top_k)[1:],
    }
    flops = {name: measure.flops(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            taken, scores = timed(way)
            times[name].append(taken)
            by_image, by_text = scores
            if name == "naive":
                expected = by_image, by_text
    same = [(a - b)[a.isfinite()].abs().max() for a, b in zip(expected, (by_image, by_text), strict=True)]
    asked = [scores.isfinite() for scores in expected]
    return Result(
        size=size,
        images=images,
        texts=images * texts_per_image,
        top_k=top_k,
        device=measure.device_name(place),
        threads=torch.get_num_threads(),
        clock=clock,
        repeats=repeats,
        pairs_asked=sum(int(each.sum()) for each in asked),
        pairs_scored=int((asked[0] | asked[1]).sum()),
        encoding=encoding,
        naive=statistics.median(times["naive"]),
        ours=statistics.median(times["ours"]),
        naive_flops=flops["naive"],
        flops=flops["ours"],
        score_difference=float(torch.stack(same).max()),
    )


def rank_naively(
    model: XVLM, gallery: Concepts, texts: Texts, top_k: int
) -> tuple[Float[Tensor, "image text"], Float[Tensor, "image text"]]:
    """The two tables of matching logits that :func:`xvlm.evaluate.rank` gives, a query at a time."""
    states = read_padded(model.text, texts.ids, texts.mask)
    similarity = model.embed_image(gallery) @ model.embed_text(Words(states[texts.mask], texts.mask)).T

    def match(text: Tensor, image: Tensor) -> Float[Tensor, "pair"]:
        fused = fuse_padded(model, states[text], texts.mask[text], gallery.take(image))
        first = torch.ones(len(fused), 1, dtype=torch.bool, device=fused.device)
        return model.match(Words(fused[:, 0], first))[:, 1].float()

    by_image, by_text = (torch.full_like(similarity, -torch.inf) for _ in range(2))
    for image in range(similarity.shape[0]):
        best = similarity[image].topk(min(top_k, similarity.shape[1])).indices
        by_image[image, best] = match(best, torch.full_like(best, image))
    for text in range(similarity.shape[1]):
        best = similarity[:, text].topk(min(top_k, similarity.shape[0])).indices
        by_text[best, text] = match(torch.full_like(best, text), best)
    return by_image.cpu(), by_text.cpu()
