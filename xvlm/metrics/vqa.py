"""VQA accuracy as its server counts it (Antol et al. 2015; GT-Vision-Lab/VQA, ``vqaEval.py``)."""

import re
from collections.abc import Sequence

DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Mended where one of its apostrophes is missing.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
MENDED = {word[: at.start()] + word[at.end() :]: word for word in CONTRACTIONS.split() for at in re.finditer("'", word)}
MENDED["somebody'd"] = "somebodyd"  # the server's own way round


def accuracy(answer: str, given: Sequence[str]) -> float:
    """How right an answer is by those of the annotators: min(1, others who agree / 3), averaged over leaving each out.

    Where the annotators disagree, all answers are normalised first (:func:`normalise`); where they do not, none is.

    Raises:
        ValueError: no annotator.
    """
    if not given:
        raise ValueError("VQA accuracy: nobody has answered the question")
    answer, given = _one_line(answer), [_one_line(each) for each in given]
    if len(set(given)) > 1:
        answer, given = normalise(answer), [normalise(each) for each in given]
    agree, count = sum(each == answer for each in given), len(given)
    left_out = agree * min(1.0, (agree - 1) / 3) if agree else 0.0
    return (left_out + (count - agree) * min(1.0, agree / 3)) / count


def normalise(text: str) -> str:
    """Punctuation goes, or becomes a space where it stands between two letters; number words become digits; articles
    go; apostrophes come back; all in lower case."""
    delete = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        cleaned = cleaned.replace(mark, "" if delete or f"{mark} " in text or f" {mark}" in text else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
