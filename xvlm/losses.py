"""The training objectives as functions: tensors in, one scalar out.

Every loss is a mean over the rows of *all* processes: each process returns its part, scaled so that averaging over
processes (what data-parallel engines do to gradients) gives the gradient of that global mean.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xvlm import boxes, distributed


def contrastive(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Float[Tensor, ""],
    same: Int[Tensor, "pair kind"] | None = None,
) -> Float[Tensor, ""]:
    """Image-text contrastive loss (ITC; X-VLM ``get_contrastive_loss``): cross-entropy both ways over all processes.

    Args:
        image, text: unit-length features of corresponding pairs.
        temperature: divides the similarities.
        same: numbers per pair; pairs that agree in any column are positives of each other, sharing the target evenly
            (X-VLM's ``idx`` is one column). Without it only the diagonal is.
    """
    image, text = distributed.gather(torch.cat([image, text], 1)).chunk(2, 1)  # one trip between processes, not two
    logits = similarity(image, text, temperature)
    if same is None:
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    positives = matches(distributed.gather(same)).to(logits.dtype)
    target = positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_contrastive(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    same: Int[Tensor, "pair kind"] | None = None,
) -> Float[Tensor, ""]:
    """Contrastive loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, equation 1): is this the text of that image,
    asked of every pair of all processes, summed over texts, mean over images.

    Args:
        bias: is added to the similarity over the temperature; SigLIP starts with -10, because most pairs do not match.
        same: as in :func:`contrastive`; positives of each other all match.
    """
    image, text = distributed.gather(torch.cat([image, text], 1)).chunk(2, 1)
    logits = similarity(image, text, temperature) + bias
    if same is None:
        positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    else:
        positives = matches(distributed.gather(same))
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)


def matches(same: Int[Tensor, "pair kind"]) -> Bool[Tensor, "pair pair"]:
    """Pairs that agree in any column."""
    return (same[:, None] == same[None]).any(-1)


def similarity(
    image: Float[Tensor, "image dim"], text: Float[Tensor, "text dim"], temperature: Float[Tensor, ""]
) -> Float[Tensor, "image text"]:
    """Dot products over the temperature, in float32 whatever the precision around: the division magnifies rounding."""
    with torch.autocast(image.device.type, enabled=False):
        return image.float() @ text.float().T / temperature


@torch.no_grad()
def negative_weights(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Float[Tensor, ""],
    forbidden: Bool[Tensor, "pair pair"],
    groups: Int[Tensor, "pair"] | None = None,
) -> tuple[Float[Tensor, "pair pair"], Float[Tensor, "pair pair"]]:
    """Weights to draw hard negatives from: row b of the first, a wrong image for text b; of the second, a wrong text
    for image b. Softmax of the similarities plus 1e-5, forbidden entries 0 (X-VLM ``get_matching_loss``). To a pair,
    those of other ``groups`` do not exist.
    """
    # Features that are not finite must not fail here: the contrastive loss then names them.
    logits = similarity(image, text, temperature)
    if groups is not None:
        elsewhere = groups[:, None] != groups
        logits, forbidden = logits.masked_fill(elsewhere, -torch.inf), forbidden | elsewhere
    wrong_image = (logits.T.softmax(1).nan_to_num() + 1e-5).masked_fill(forbidden.T, 0)
    wrong_text = (logits.softmax(1).nan_to_num() + 1e-5).masked_fill(forbidden, 0)
    return wrong_image, wrong_text


@torch.no_grad()
def hard_negatives(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Float[Tensor, ""],
    forbidden: Bool[Tensor, "pair pair"] | None = None,
    groups: Int[Tensor, "pair"] | None = None,
) -> tuple[Int[Tensor, "negative"], Int[Tensor, "negative"], Int[Tensor, "negative"], Int[Tensor, "negative"]]:
    """Draw a similar but wrong image for each text and a wrong text for each image, from the local pairs.

    Args:
        groups: a number per pair; negatives are of the same group, and drawn by dice that its number decides. Whatever
            else is in the batch then changes nothing.

    Returns:
        ``(texts, their wrong images, images, their wrong texts)`` as row numbers. A row that no negative is left for
        (all its mates forbidden, or a batch of one) is left out instead of failing.
    """
    if forbidden is None:
        forbidden = torch.eye(len(image), dtype=torch.bool, device=image.device)
    weights = torch.stack(negative_weights(image, text, temperature, forbidden, groups))
    dice = torch.empty_like(weights).exponential_() if groups is None else _dice(groups)
    # Of exponential variates with these rates, each is the first to arrive with a probability that its rate decides.
    wrong_image, wrong_text = (weights / dice).argmax(-1)
    texts, images = (possible.nonzero()[:, 0] for possible in weights.sum(-1) > 0)
    return texts, wrong_image[texts], images, wrong_text[images]


def _dice(groups: Int[Tensor, "pair"]) -> Float[Tensor, "2 pair pair"]:
    """Exponential variates, which within a group depend on its number only; made on the CPU: the same on any device."""
    dice = torch.ones(2, len(groups), len(groups))
    for number in groups.unique().tolist():
        rows = (groups == number).nonzero()[:, 0].cpu()
        generator = torch.Generator().manual_seed(number)
        dice[:, rows[:, None], rows] = torch.empty(2, len(rows), len(rows)).exponential_(generator=generator)
    return dice.to(groups.device)


def classification(logits: Float[Tensor, "row class"], answer: Int[Tensor, "row"]) -> Float[Tensor, ""]:
    """Cross-entropy of the right classes; a mean over all processes' rows."""
    return _global_mean(F.cross_entropy(logits.float(), answer, reduction="none"))


def matching(logits: Float[Tensor, "row 2"], match: Int[Tensor, "row"]) -> Float[Tensor, ""]:
    """Image-text matching (ITM): cross-entropy of match (1) against mismatch (0)."""
    return classification(logits, match)


def masked_words(logits: Float[Tensor, "hole vocabulary"], words: Int[Tensor, "hole"]) -> Float[Tensor, ""]:
    """Masked language modelling (MLM): cross-entropy of the hidden words; a mean over all processes' hidden words."""
    return classification(logits, words)


def next_words(
    logits: Float[Tensor, "word vocabulary"], words: Int[Tensor, "word"], smoothing: float = 0.0
) -> Float[Tensor, "word"]:
    """Loss of each word of a text: its negative log-probability; a mean over words is for the caller to take.

    Args:
        smoothing: X-VLM's: the target is 1 - smoothing for the word and smoothing / V for each of the V - 1 others,
            which is smoothing / V short of 1.
    """
    log_p = logits.float().log_softmax(-1)
    of_word = log_p.gather(1, words[:, None])[:, 0]
    if not smoothing:
        return -of_word
    return -(1 - smoothing) * of_word - smoothing / log_p.shape[1] * (log_p.sum(1) - of_word)


def captions(
    logits: Float[Tensor, "word vocabulary"], words: Int[Tensor, "word"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Captioning: mean of :func:`next_words` over all processes' words."""
    return _global_mean(next_words(logits, words, smoothing))


def answers(
    logits: Float[Tensor, "word vocabulary"], words: Int[Tensor, "word"], weights: Float[Tensor, "word"], questions: int
) -> Float[Tensor, ""]:
    """Visual question answering: the words' losses times their answer's weight, summed per question, mean of questions.

    Args:
        questions: how many there are on this process; the mean is over all processes' questions.
    """
    count = torch.tensor(float(questions), device=logits.device)
    return (weights * next_words(logits, words)).sum() * distributed.share_of_mean(count)


def box_l1_giou(
    predicted_cxcywh: Float[Tensor, "box 4"], target_cxcywh: Float[Tensor, "box 4"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Box losses (X-VLM ``get_bbox_loss``): L1 summed over the four normalised coordinates, and 1 - GIoU."""
    predicted, target = predicted_cxcywh.float(), target_cxcywh.float()
    l1 = (predicted - target).abs().sum(-1)
    giou = boxes.giou(boxes.cxcywh_to_xyxy(predicted), boxes.cxcywh_to_xyxy(target))
    return _global_mean(l1), _global_mean(1 - giou)


def _global_mean(values: Float[Tensor, "row"]) -> Float[Tensor, ""]:
    count = torch.tensor(float(len(values)), device=values.device)
    return values.sum() * distributed.share_of_mean(count)
