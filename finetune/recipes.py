"""The tasks one can fine-tune on, each by its parts: what it learns from, the model, how it is asked, its numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from views import CAPTIONING, GROUNDING, IMAGE_TO_TEXT, NLVR, TEXT_TO_IMAGE, VQA, View

from xvlm import evaluate, hub
from xvlm.data import proposals
from xvlm.data.processor import Processor
from xvlm.data.shards import Shards
from xvlm.data.stream_config import Grain, StreamConfig
from xvlm.data.streams import Stream
from xvlm.evaluate import Numbers
from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.xvlm import XVLM, Pretrained
from xvlm.presence import Presence, WithPresence
from xvlm.tasks import captioning, grounding, nlvr, retrieval, vqa
from xvlm.zeroshot import weak
from xvlm.zeroshot.gradcam import BestLayer

TaskConfig = Annotated[
    retrieval.RetrievalConfig
    | grounding.GroundingConfig
    | weak.WeakGroundingConfig
    | vqa.VqaConfig
    | captioning.CaptioningConfig
    | nlvr.NlvrConfig,
    Field(discriminator="name"),
]


def texts_about_images(task: Any, config: StreamConfig, processor: Processor, **place: int) -> Stream:
    """The stream of a task that learns from captions or regions as pre-training reads them."""
    return Stream(config, processor, None, **place)


def as_it_is(task: Any, pretrained: XVLM, fresh: list[str]) -> tuple[XVLM, list[str]]:
    """The model of a task that only reads other heads off the pre-trained one."""
    return pretrained, fresh


@dataclass(frozen=True)
class Recipe:
    """The parts of a task. Their arguments are as those of the functions in this file."""

    task: Callable[[Any, Any], nn.Module]  # configuration and model -> losses
    grain: Grain  # of the stream that it learns from
    heads: tuple[str, ...]  # of the pre-trained model
    ask: Callable[..., list[Any]]
    row: type  # of what `ask` returns
    numbers: Callable[[Any, Sequence[Any]], Numbers]  # of the task's configuration and rows
    chance: Callable[[Sequence[Any], Shards], Numbers]  # of an answer that needs no model
    protocol: str  # what the numbers are, those that there always are
    notes: Mapping[str, str] = field(default_factory=dict)  # what others are, by how their names begin
    views: tuple[View, ...] = ()  # how a report looks at the rows
    stream: Callable[..., Stream] = texts_about_images
    model: type[Pretrained] = XVLM
    prepare: Callable[[Any, Processor, Sequence[Path]], None] = lambda task, processor, trained_on: None
    start: Callable[[Any, XVLM, list[str]], tuple[nn.Module, list[str]]] = as_it_is
    looks: int = 1  # images that a text is about
    end_token: bool = False  # whether texts end with [SEP]
    submission: Callable[[Sequence[Any]], Any] | None = None  # what the benchmark's server takes, as JSON
    more_heads: Callable[[Any], tuple[str, ...]] = lambda task: ()  # those that this configuration of the task needs
    left_out: Callable[[Shards, Sequence[int]], int] = lambda shards, indices: 0  # texts that cannot be asked fairly
    # What else the answers depend on, for the results: of the task, `evaluation.proposals`, the folder of the weights.
    facts: Callable[..., dict[str, Any]] = lambda task, **_: {}

    def explain(self, numbers: Numbers) -> str:
        """What these numbers are, and nothing about numbers that are not among them."""
        notes = [note for name, note in self.notes.items() if any(number.startswith(name) for number in numbers)]
        return " ".join([self.protocol, *notes])


# How each is asked about a split: a row for each example, on every process the same.


def ask_for_ranks(
    task: retrieval.Task, processor: Processor, shards: Shards, indices: Sequence[int], *, batch_size: int, **_: Any
) -> list[evaluate.Ranked]:
    asked = {"captions": task.config.captions, "top_k": task.config.top_k, "batch_size": batch_size}
    return evaluate.retrieval(task.model, processor, shards, indices, **asked).rows


def ask_for_boxes(
    task: grounding.Task,
    processor: Processor,
    shards: Shards,
    indices: Sequence[int],
    *,
    batch_size: int,
    weights: Path | None,
    **_: Any,
) -> list[evaluate.Query]:
    asked: dict[str, Any] = {"batch_size": batch_size, "absent": True}
    known = presence_of(task, weights)
    if known is None:
        return evaluate.grounding(task, processor, shards, indices, **asked)
    sure = WithPresence(task, task.model, known)
    return evaluate.grounding(sure, processor, shards, indices, threshold=known.threshold, **asked)


def presence_of(task: grounding.Task, weights: Path | None) -> Presence | None:
    """What was calibrated for the weights in a folder, where the model can say it."""
    return Presence.from_pretrained(weights) if weights and "itm_head" in task.model.config.heads else None


def facts_of_presence(task: grounding.Task, *, weights: Path | None, **_: Any) -> dict[str, Any]:
    known = presence_of(task, weights)
    return {"proposals": "none", "presence": None if known is None else known.model_dump(exclude={"weights"})}


def ask_for_heat(
    task: weak.Task,
    processor: Processor,
    shards: Shards,
    indices: Sequence[int],
    *,
    batch_size: int,
    weights: Path | None,
    boxes_from: proposals.Source,
    **_: Any,
) -> list[evaluate.Query]:
    asked = {"batch_size": batch_size, "proposals": proposals.reader(boxes_from)}
    return evaluate.grounding(task.method(best_layer(weights)), processor, shards, indices, **asked)


def best_layer(weights: Path | None) -> int | None:
    """What ``xvlm layers`` stored with the weights."""
    known = BestLayer.from_pretrained(weights) if weights else None
    return None if known is None else known.layer


def facts_of_heat(task: weak.Task, *, weights: Path | None, boxes_from: proposals.Source) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": task.method(best_layer(weights)).layer, "proposals": str(boxes_from)}
    return found | ({"proposals_sha256": hub.digest(boxes_from)} if isinstance(boxes_from, Path) else {})


def numbers_of_heat(rows: Sequence[evaluate.Query]) -> Numbers:
    """With proposals, also what choosing the best of them would get."""
    numbers = evaluate.referring_numbers(rows)
    if any(row.proposals_xyxy for row in rows):
        numbers["acc@0.5 of the best proposal"] = evaluate.referring_numbers(evaluate.best_proposals(rows))["acc@0.5"]
    return numbers


def chance_of_heat(rows: Sequence[evaluate.Query], shards: Shards) -> Numbers:
    """The whole image as the answer, or where boxes were proposed, any of them."""
    return evaluate.referring_numbers(evaluate.random_proposals(evaluate.whole_images(rows, shards)))


def ask_for_answers(
    task: vqa.Task,
    processor: Processor,
    shards: Shards,
    indices: Sequence[int],
    *,
    batch_size: int,
    trained_on: Callable[[], Sequence[Path]],
    **_: Any,
) -> list[vqa.Answered]:
    if task.answers is None and task.config.ask == "rank":
        task.answers = vqa.answer_list(task.config, trained_on())

    def predict(_places, records, images):
        return vqa.ask(task, processor, task.answers or [], records, images)

    return evaluate.each_once(predict, processor, shards, indices, batch_size=batch_size)


def ask_for_captions(
    task: captioning.Task, processor: Processor, shards: Shards, indices: Sequence[int], *, batch_size: int, **_: Any
) -> list[captioning.Captioned]:
    def predict(_places, records, images):
        return captioning.ask(task, processor, records, images)

    return evaluate.each_once(predict, processor, shards, indices, batch_size=batch_size)


def ask_for_truth(
    task: nlvr.Task, processor: Processor, shards: Shards, indices: Sequence[int], *, batch_size: int, **_: Any
) -> list[nlvr.Judged]:
    predict = partial(nlvr.ask, task, processor, shards)
    return evaluate.each_once(predict, processor, shards, indices, batch_size=batch_size)


BOXES = (
    "acc@t: share of phrases whose box has an IoU of t or more with the true one (right and bottom exclusive). "
    "overall_iou: summed intersections over summed unions. small, medium, large: below 32² and 96² pixels of the "
    "stored image."
)
ABSENT = {
    "absent": "Of phrases without a target (gRefCOCO), whose share is absent: n_acc is the share of them of which "
    "that is said, t_acc the share of the others of which it is not, f1_precision the share of all "
    "phrases answered with no box or the only one, as is right, by IoU (and by generalised IoU, as in "
    "gRefCOCO's script), several the share that name more than one thing; calibration_error is the ECE of "
    "presence in 15 bins. Without a presence every box is an answer."
}

RECIPES = {
    "retrieval": Recipe(
        task=retrieval.Task,
        grain="caption",
        heads=retrieval.HEADS,
        ask=ask_for_ranks,
        row=evaluate.Ranked,
        numbers=lambda task, rows: evaluate.retrieval_numbers(rows),
        chance=lambda rows, shards: evaluate.retrieval_chance(rows),
        protocol="R@k: share of queries with a right answer among the first k. The top_k most similar candidates of a "
        "query are re-ranked by the matching head, others are not found; ties count half. Chance: a random order.",
        views=(TEXT_TO_IMAGE, IMAGE_TO_TEXT),
    ),
    "grounding": Recipe(
        task=grounding.Task,
        grain="region",
        heads=grounding.HEADS,
        ask=ask_for_boxes,
        row=evaluate.Query,
        numbers=lambda task, rows: evaluate.referring_numbers(rows),
        chance=lambda rows, shards: evaluate.referring_numbers(evaluate.whole_images(rows, shards)),
        protocol=f"{BOXES} Chance: the whole image as the answer.",
        notes=ABSENT,
        views=(GROUNDING,),
        left_out=evaluate.left_out,
        more_heads=lambda task: ("itm_head",) if task.itm else (),
        facts=facts_of_presence,
    ),
    "weak_grounding": Recipe(
        task=weak.Task,
        grain="region",
        heads=weak.HEADS,
        ask=ask_for_heat,
        row=evaluate.Query,
        numbers=lambda task, rows: numbers_of_heat(rows),
        chance=chance_of_heat,
        protocol=f"{BOXES} The box is the proposal in which Grad-CAM of the matching head, at one cross layer, has "
        "most heat over area ** alpha, or where nothing is proposed the box around the heat. "
        "pointing_game: the hottest cell's middle is in the true box; energy_in_box: the share of "
        "heat in it. Chance: any of the proposals, without proposals the whole image.",
        notes=ABSENT,
        views=(GROUNDING,),
        left_out=evaluate.left_out,
        facts=facts_of_heat,
    ),
    "vqa": Recipe(
        task=vqa.Task,
        grain="question",
        heads=vqa.HEADS,
        ask=ask_for_answers,
        row=vqa.Answered,
        numbers=lambda task, rows: vqa.numbers(rows),
        chance=lambda rows, shards: vqa.numbers(vqa.commonest(rows)),
        protocol="VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving each annotator out, after the "
        "server's normalisation. Chance: the commonest answer of this split to each kind of question.",
        notes={"accuracy ": "accuracy KIND: of questions of that kind."},
        views=(VQA,),
        stream=lambda task, config, processor, **place: vqa.Questions(config, processor, None, **place),
        model=Answerer,
        start=lambda task, pretrained, fresh: vqa.starting_model(task, pretrained),
        submission=vqa.submission,
    ),
    "captioning": Recipe(
        task=captioning.Task,
        grain="caption",
        heads=captioning.HEADS,
        ask=ask_for_captions,
        row=captioning.Captioned,
        numbers=lambda task, rows: captioning.numbers(rows, java=task.java),
        chance=lambda rows, shards: captioning.numbers(captioning.of_others(rows)),
        protocol="CIDEr is CIDEr-D, document frequencies from this split's references; BLEU-n of the whole split "
        "against the nearest length; ROUGE-L with beta 1.2; own implementations and tokenizer. Chance: what people "
        "wrote of another image. Words that slices go by are those of an image's references, of any of them.",
        views=(CAPTIONING,),
        stream=captioning.Captions,
        prepare=captioning.prepare,
        model=Captioner,
        start=lambda task, pretrained, fresh: (Captioner.of(pretrained), []),
        end_token=True,
    ),
    "nlvr": Recipe(
        task=nlvr.Task,
        grain="statement",
        heads=nlvr.HEADS,
        ask=ask_for_truth,
        row=nlvr.Judged,
        numbers=lambda task, rows: nlvr.numbers(rows),
        chance=lambda rows, shards: nlvr.numbers(nlvr.commonest(rows)),
        protocol="accuracy over statements; consistency: share of texts judged right of every pair of images they are "
        "said about. Chance: all as most of them are.",
        views=(NLVR,),
        stream=lambda task, config, processor, **place: nlvr.Pairs(config, processor, None, **place),
        looks=2,
    ),
    # Text assignment, which prepares a model for NLVR2 (init.model of an nlvr run); it has no numbers of its own.
    "assignment": Recipe(
        task=nlvr.Assignment,
        grain="caption",
        heads=nlvr.ASSIGNMENT_HEADS,
        ask=lambda *_, **__: [],
        row=dict,
        numbers=lambda task, rows: {},
        chance=lambda rows, shards: {},
        protocol="none: fine-tune on nlvr",
        looks=2,
    ),
}
