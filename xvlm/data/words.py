"""Words: cleaning captions and questions, and choosing which words a model has to guess."""

import re
from collections.abc import Sequence
from random import Random
from typing import Annotated

from pydantic import Field

from xvlm.config import Configured

Share = Annotated[float, Field(ge=0, le=1)]

DELETED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


def clean_caption(text: str, max_words: int) -> str:
    """Lower case, no punctuation (deleted, not replaced: "it's" is "its"), at most ``max_words`` words.

    The reference's ``pre_caption``.

    Raises:
        ValueError: nothing is left.
    """
    cleaned = text.lower().translate(DELETED).replace("<person>", "person")
    cleaned = re.sub(r"\s{2,}", " ", cleaned).rstrip("\n").strip(" ")
    if not cleaned:
        raise ValueError(f"text {text!r} has no words once punctuation is deleted")
    return " ".join(cleaned.split(" ")[:max_words])


def clean_question(text: str, max_words: int) -> str:
    """As :func:`clean_caption`, but spaces stay and count, and nothing may be left (reference ``pre_question``)."""
    return " ".join(text.lower().translate(DELETED).rstrip(" ").split(" ")[:max_words])


class WordMasking(Configured):
    """How many words are hidden, and how they cluster (X-VLM's ``TextMaskingGenerator``)."""

    probability: Share = 0.25
    max_masked: Annotated[int, Field(ge=1)] = 8
    skipgram_probability: Share = 0.2  # that 2 to `skipgram_size` tokens in a row are hidden instead of one
    skipgram_size: Annotated[int, Field(ge=2)] = 3
    whole_word: bool = True


def choose_masked(continues: Sequence[bool], config: WordMasking, rng: Random) -> list[int]:
    """Positions to hide: of L tokens exactly ``min(max_masked, max(1, round(L * probability)))``, never the first.

    Whole words and runs of words are chosen until that many are reached; what is too much is dropped at random, so the
    last one may be hidden in part. ``round`` rounds halves to even. A text of one token has nothing to hide.

    Args:
        continues: of each token, whether it continues the word of the token before; the first is [CLS].
        rng: drawn from in the order of the reference, so that equal states give equal choices.
    """
    length = len(continues)
    count = min(config.max_masked, max(1, round(length * config.probability)))
    candidates = list(range(1, length))
    rng.shuffle(candidates)
    chosen: set[int] = set()  # a set: the order in which small integers leave it is the reference's order too
    for start in candidates:
        if len(chosen) >= count:
            break
        if start in chosen:
            continue
        end = start + 1
        if config.skipgram_probability > 0 and rng.random() < config.skipgram_probability:
            end = start + rng.randint(2, config.skipgram_size)
        if config.whole_word:
            start, end = _whole_words(continues, start, end)
        chosen.update(range(max(start, 1), min(end, length)))
    positions = list(chosen)
    if len(positions) > count:
        rng.shuffle(positions)
    return positions[:count]


def _whole_words(continues: Sequence[bool], start: int, end: int) -> tuple[int, int]:
    while start > 1 and continues[start]:
        start -= 1
    while end < len(continues) and continues[end]:
        end += 1
    return start, end


def mask_words(
    ids: Sequence[int], continues: Sequence[bool], config: WordMasking, rng: Random, mask_id: int, vocab_size: int
) -> tuple[list[int], list[bool]]:
    """The ids with words hidden (80 % the mask token, 10 % any token, 10 % left as they are), and where.

    Args:
        ids: of one text, [CLS] first, without padding.
        continues: see :func:`choose_masked`.
    """
    masked, hidden = list(ids), [False] * len(ids)
    for position in choose_masked(continues, config, rng):
        hidden[position] = True
        if rng.random() < 0.8:
            masked[position] = mask_id
        elif rng.random() < 0.5:
            masked[position] = rng.randint(0, vocab_size - 1)
    return masked, hidden
