"""Writing texts word by word: greedy and beam search, and drawing them at random.

Lengths are counted as X-VLM counts them (transformers 4.12, ``generate``): the prompt is in them, also in the length by
which a text's score is divided. Or as transformers counts today: without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from xvlm.config import Configured
from xvlm.types import Movable, Texts

# Logits of the word after each row of words. A row of the second argument says which row of the last call is continued.
NextWord = Callable[[Int[Tensor, "row word"], Int[Tensor, "row"]], Float[Tensor, "row vocabulary"]]


class GenerationConfig(Configured):
    """Lengths are in tokens."""

    beams: Annotated[int, Field(ge=1)] = 3  # 1: greedy
    count_prompt: bool = True  # among them, as X-VLM does; false: as transformers 5 does
    max_tokens: int = 20  # the end token included
    min_tokens: int = 5  # this many come before the end token
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0  # above 1: words already there are less likely
    # Greedy: a text that does not end in time gives up its last word for the end token, as in X-VLM's sampling for
    # self-critical training; otherwise it just stops.
    close: bool = False


@dataclass(frozen=True)
class Written(Movable):
    """Texts with prompt and end token, and a score each.

    The score is the log-probability of the words after the prompt: their mean (greedy), or their sum divided by the
    number of tokens before the end, prompt included (beams), or with it, without the prompt (``count_prompt`` off).
    """

    texts: Texts
    scores: Float[Tensor, "text"]


@torch.no_grad()
def generate(next_word: NextWord, prompt: Int[Tensor, "text word"], end: int, config: GenerationConfig) -> Written:
    """Continue each prompt until ``end`` or ``max_tokens``; with 1 beam :func:`greedy`, else :func:`beam_search`.

    Raises:
        ValueError: the prompts leave no room for a word.
    """
    if not config.count_prompt:
        given = prompt.shape[1]
        config = config.model_copy(
            update={"max_tokens": config.max_tokens + given, "min_tokens": config.min_tokens + given}
        )
    if prompt.shape[1] >= config.max_tokens:
        raise ValueError(f"prompts of {prompt.shape[1]} tokens leave no room in max_tokens {config.max_tokens}")
    return (greedy if config.beams == 1 else beam_search)(next_word, prompt, end, config)


def greedy(next_word: NextWord, prompt: Int[Tensor, "text word"], end: int, config: GenerationConfig) -> Written:
    """The most likely word, again and again. The repetition penalty works on logits."""
    ids, rows = prompt, torch.arange(len(prompt), device=prompt.device)
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    mask, total = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), device=ids.device)
    while ids.shape[1] < config.max_tokens and unfinished.any():
        scores = _adjusted(next_word(ids, rows).float(), ids, end, config)
        best = scores.log_softmax(-1).max(-1)
        total = total + best.values * unfinished
        word = best.indices * unfinished
        if config.close and ids.shape[1] + 1 == config.max_tokens:
            word = end * unfinished
        ids, mask = torch.cat([ids, word[:, None]], 1), torch.cat([mask, unfinished[:, None]], 1)
        unfinished = unfinished & (word != end)
    return Written(Texts(ids, mask), total / (mask.sum(1) - prompt.shape[1]))


def beam_search(next_word: NextWord, prompt: Int[Tensor, "text word"], end: int, config: GenerationConfig) -> Written:
    """The best of the texts found by continuing the ``beams`` most likely ones at each length.

    The repetition penalty works on log-probabilities. A prompt is finished when it has ``beams`` ended texts and the
    worst of them is no worse than the best one still growing would be if it ended now.
    """
    count, beams, given = len(prompt), config.beams, prompt.shape[1]
    ids = prompt.repeat_interleave(beams, 0)
    continued = torch.arange(len(ids), device=ids.device)
    first = continued.view(count, beams)[:, :1]
    total = torch.full((count, beams), -torch.inf, device=ids.device)
    total[:, 0] = 0  # all beams of a prompt are still the same
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
    growing = set(range(count))
    while growing and (length := ids.shape[1]) < config.max_tokens:
        log_p = _adjusted(next_word(ids, continued).float().log_softmax(-1), ids, end, config)
        candidates = (total[:, :, None] + log_p.unflatten(0, (count, beams))).flatten(1)
        # At most one of a beam's candidates ends, so that twice as many leave enough to go on with.
        best, place = candidates.topk(2 * beams)
        row, word = first + place // log_p.shape[1], place % log_p.shape[1]
        scores, parents, ends = best.tolist(), row.tolist(), word == end
        counted = length if config.count_prompt else length + 1 - given
        for i, rank in (ends[:, :beams] & best[:, :beams].isfinite()).nonzero().tolist():
            if i in growing:
                _keep(ended[i], scores[i][rank] / counted, [*ids[parents[i][rank]].tolist(), end], beams)
        onward = ends.byte().argsort(dim=1, stable=True)[:, :beams]
        total, continued = best.gather(1, onward), row.gather(1, onward).flatten()
        ids = torch.cat([ids[continued], word.gather(1, onward).view(-1, 1)], 1)
        hope = (best if config.count_prompt else total)[:, 0].tolist()  # transformers 4 looks at ended texts, too
        growing = {i for i in growing if len(ended[i]) < beams or ended[i][-1][0] < hope[i] / counted}
    for i in growing:
        for beam in total[i].isfinite().nonzero()[:, 0].tolist():
            counted = ids.shape[1] - (0 if config.count_prompt else given)
            _keep(ended[i], total[i, beam].item() / counted, ids[i * beams + beam].tolist(), beams)
    scores = torch.tensor([texts[0][0] for texts in ended], device=ids.device)
    return Written(_padded([texts[0][1] for texts in ended], ids.device), scores)


class Drawn(NamedTuple):
    """Texts drawn word by word, and the log-probability of each word after the prompt (0 behind the end)."""

    texts: Texts
    log_p: Float[Tensor, "text new"]


def draw(
    next_word: NextWord,
    prompt: Int[Tensor, "text word"],
    end: int,
    max_tokens: int,
    uniform: Float[Tensor, "text most"],
) -> Drawn:
    """Draw each word from what the model takes for likely, until ``end`` or ``max_tokens``, prompt included.

    Args:
        uniform: numbers between 0 and 1, one for each word that there can be: the same ones draw the same words.
    """
    ids, rows = prompt, torch.arange(len(prompt), device=prompt.device)
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    mask, said = torch.ones_like(ids, dtype=torch.bool), []
    while ids.shape[1] < max_tokens and unfinished.any():
        log_p = next_word(ids, rows).float().log_softmax(-1)
        below = log_p.detach().double().exp().cumsum(-1)
        target = uniform[:, len(said), None].double() * below[:, -1:]
        word = (below <= target).sum(-1).clamp(max=log_p.shape[1] - 1) * unfinished
        said.append(log_p.gather(1, word[:, None])[:, 0] * unfinished)
        ids, mask = torch.cat([ids, word[:, None]], 1), torch.cat([mask, unfinished[:, None]], 1)
        unfinished = unfinished & (word != end)
    return Drawn(Texts(ids, mask), torch.stack(said, 1))


def _keep(ended: list[tuple[float, list[int]]], score: float, text: list[int], beams: int) -> None:
    """Add a text to the best ``beams`` found so far, best first."""
    ended.append((score, text))
    ended.sort(key=lambda scored: -scored[0])
    del ended[beams:]


def _adjusted(
    scores: Float[Tensor, "row vocabulary"], ids: Int[Tensor, "row word"], end: int, config: GenerationConfig
) -> Float[Tensor, "row vocabulary"]:
    if config.repetition_penalty != 1:
        said = scores.gather(1, ids)
        penalty = config.repetition_penalty
        scores = scores.scatter(1, ids, torch.where(said < 0, said * penalty, said / penalty))
    if ids.shape[1] < config.min_tokens:
        scores = scores.index_fill(1, torch.tensor(end, device=ids.device), -torch.inf)
    return scores


def _padded(rows: list[list[int]], device: torch.device) -> Texts:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, words in enumerate(rows):
        ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), True
    return Texts(ids.to(device), mask.to(device))
