"""Caption metrics: BLEU, ROUGE-L and CIDEr-D as the COCO caption server counts them; METEOR and SPICE through an extra.

Captions are lists of words, see :func:`words`. A set is a caption for each image and the images' references.
"""

import importlib.util
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

logger = logging.getLogger(__name__)

# The Penn Treebank's words, as far as captions have them: abbreviations and numbers stay whole, clitics are split off,
# hyphens and slashes inside words stay.
TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}|\d+(?:[.,:/]\d+)+|[^\W\d_]+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-/]\w+)*|[$%&#()]"
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-"}


def words(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation; brackets count as words, which is the server's slip.

    Close to the server's tokenizer (Stanford's, in Java), which knows many more cases.
    """
    return [BRACKETS.get(word, word) for word in TOKEN.findall(caption.lower())]


def grams(caption: Words, longest: int = 4) -> Grams:
    """Every run of up to ``longest`` words, with how often it occurs."""
    return Counter(tuple(caption[i : i + n]) for n in range(1, longest + 1) for i in range(len(caption) - n + 1))


def bleu(written: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = 4) -> list[float]:
    """BLEU-1 to BLEU-``longest`` of a whole set (Papineni et al. 2002), against the reference of the nearest length.

    Raises:
        ValueError: nothing to score, or an image without a reference.
    """
    _check(written, references)
    right, said, length, wanted = [0] * longest, [0] * longest, 0, 0
    for caption, known in zip(written, references, strict=True):
        length += len(caption)
        wanted += min((abs(len(each) - len(caption)), len(each)) for each in known)[1]
        most: Grams = Counter()
        for each in known:
            most |= grams(each, longest)
        for gram, count in grams(caption, longest).items():
            right[len(gram) - 1] += min(count, most[gram])
            said[len(gram) - 1] += count
    brevity = min(1.0, math.exp(1 - wanted / length)) if length else 0.0
    scores, product = [], 1.0
    for n in range(longest):
        product *= right[n] / said[n] if said[n] else 0.0
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def rouge_l(written: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004), a mean over images: F-measure of the longest common subsequence, recall weighted by beta².

    Precision and recall are each the best over the references, as the server has it.
    """
    _check(written, references)
    scores = []
    for caption, known in zip(written, references, strict=True):
        common = [_common(caption, each) for each in known]
        precision = max(common) / max(1, len(caption))
        recall = max(n / max(1, len(each)) for n, each in zip(common, known, strict=True))
        both = precision and recall
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0)
    return sum(scores) / len(scores)


class Documents(NamedTuple):
    """In how many images' references each run of words is, and how many images there are."""

    counts: Grams
    images: int

    @classmethod
    def of(cls, references: Iterable[Sequence[Words]]) -> "Documents":
        counts: Grams = Counter()
        images = 0
        for several in references:
            counts.update(set().union(*map(grams, several)))
            images += 1
        return cls(counts, images)


def cider_d(
    written: Sequence[Words],
    references: Sequence[Sequence[Words]],
    sigma: float = 6.0,
    *,
    documents: Documents | None = None,
) -> list[float]:
    """CIDEr-D of each image (Vedantam et al. 2015), whose mean is the set's; 10 is a caption equal to all references.

    Runs of words are weighted by their rarity among ``documents``, or among this set's references, so that a set of one
    image scores 0. As in the server's code, lengths are compared in pairs of words, one less than in the paper's words.
    """
    _check(written, references)
    known = [[grams(each) for each in several] for several in references]
    documents = documents or Documents.of(references)
    total = math.log(documents.images)

    def weigh(counts: Grams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (total - math.log(max(1, documents.counts[gram])))
        return vectors

    scores = []
    for caption, several in zip(written, known, strict=True):
        own, mine = grams(caption), weigh(grams(caption))
        found = 0.0
        for each in several:
            shift = _pairs(own) - _pairs(each)
            penalty = math.exp(-(shift**2) / (2 * sigma**2))
            found += penalty * sum(_clipped_cosine(a, b) for a, b in zip(mine, weigh(each), strict=True)) / 4
        scores.append(10 * found / len(several))
    return scores


def need_java() -> None:
    """Whether METEOR and SPICE can be had.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed; names the extra.
        FileNotFoundError: there is no Java.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        message = "METEOR and SPICE need pycocoevalcap: pip install -e '.[captions]', and Java"
        raise ModuleNotFoundError(message, name="pycocoevalcap")
    if shutil.which("java") is None:
        raise FileNotFoundError("METEOR and SPICE run Java, and there is no java on the path")


def with_java(written: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """METEOR and SPICE of untokenised captions, by the server's own code, which runs Java; raises as :func:`need_java`.

    SPICE fetches Stanford's parser when it is first used; where it cannot, it is left out, which the log says.
    """
    need_java()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split = PTBTokenizer()
    known = split.tokenize({name: [{"caption": text} for text in texts] for name, texts in references.items()})
    said = split.tokenize({name: [{"caption": text}] for name, text in written.items()})
    scores = {"METEOR": Meteor().compute_score(known, said)[0]}
    try:
        scores["SPICE"] = Spice().compute_score(known, said)[0]
    except OSError as error:
        logger.warning("SPICE is left out: Stanford's parser, which it needs, cannot be fetched: %s", error)
    return scores


def _common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return row[-1]


def _pairs(counts: Grams) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _clipped_cosine(said: dict[tuple[str, ...], float], known: dict[tuple[str, ...], float]) -> float:
    """Cosine in which saying something more often than the reference is worth no more."""
    dot = sum(min(weight, known[gram]) * known[gram] for gram, weight in said.items() if gram in known)
    norms = math.sqrt(sum(w * w for w in said.values())) * math.sqrt(sum(w * w for w in known.values()))
    return dot / norms if norms else 0.0


def _check(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if not written:
        raise ValueError("nothing to score: no captions were given")
    if len(written) != len(references):
        raise ValueError(f"{len(written)} captions, but references of {len(references)} images")
    for i, known in enumerate(references):
        if not known:
            raise ValueError(f"references[{i}]: an image without a caption cannot be scored; leave it out")
