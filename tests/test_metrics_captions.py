"""Caption metrics: closed forms by hand, and the server's own code where it is installed."""

import contextlib
import io
import math
import random
import shutil
import sys

import pytest

from xvlm.metrics import captions


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_bleu_counts_a_word_as_often_as_a_reference_has_it():
    """The first example of Papineni et al. 2002: two of seven."""
    written, known = split("the the the the the the the"), split("the cat is on the mat", "there is a cat on the mat")
    assert captions.bleu(written, [known]) == pytest.approx([2 / 7, 0, 0, 0])


def test_bleu_penalises_what_is_shorter_than_the_nearest_reference():
    known = split("the cat is on the mat")
    assert captions.bleu(split("the cat"), [known], 2) == pytest.approx([math.exp(1 - 6 / 2)] * 2)
    assert captions.bleu(split("a b c"), [split("a b", "a b c d")], 1) == [1.0]  # of two as near, the shorter


def test_bleu_is_of_the_whole_set():
    found = captions.bleu(split("a b", "x x x x"), [split("a b"), split("y y y y")])
    assert found[0] == pytest.approx(2 / 6)  # the mean over captions would be 1/2
    assert captions.bleu(split("a b c d e"), [split("a b c d e")]) == pytest.approx([1.0] * 4)


def test_rouge_l_takes_the_best_precision_and_the_best_recall():
    def measure(precision, recall):
        return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)

    assert captions.rouge_l(split("a b c d"), [split("a c d e f")]) == pytest.approx(measure(3 / 4, 3 / 5))
    two = [split("a b c d e f g h", "a x")]  # precision of the first, recall of the second
    assert captions.rouge_l(split("a b c d"), two) == pytest.approx(measure(4 / 4, 1 / 2))
    assert captions.rouge_l(split("a"), [split("b")]) == 0


def test_cider_d_by_hand():
    """Two images of different words: each word is in one of two documents, so all weigh log 2."""
    other, theirs = split("r s")[0], split("r s")
    same = captions.cider_d([*split("p q u v"), other], [split("p q u v"), theirs])
    assert same == pytest.approx([10.0, 5.0])  # the second has no runs of three and four
    shorter = captions.cider_d([*split("p"), other], [split("p q"), theirs])[0]
    assert shorter == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)
    repeated = captions.cider_d([*split("p p"), other], [split("p q"), theirs])[0]
    assert repeated == pytest.approx(10 / (2 * math.sqrt(2)) / 4)  # the second p is worth nothing
    halved = captions.cider_d([*split("p q u v"), other], [split("p q u v", "k l m n"), theirs])[0]
    assert halved == pytest.approx(5.0)


def test_what_everyone_says_is_worth_nothing():
    assert captions.cider_d(split("a b"), [split("a b")]) == [0.0]
    assert captions.cider_d(split("a", "a"), [split("a"), split("a")]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog isn't running.", "a man 's dog is n't running"),
        ("Two women (and a child) can't cross!", "two women -lrb- and a child -rrb- ca n't cross"),
        ('A close-up: "N.Y.", red/blue', "a close-up n.y. red/blue"),
        ("10:30 a.m. on a $5 bill, the 2nd of 1,000", "10:30 a.m. on a $ 5 bill the 2nd of 1,000"),
        ("The girls' toys - they've got 3.5", "the girls toys they 've got 3.5"),
    ],
)
def test_words_of_a_caption(caption, expected):
    assert captions.words(caption) == expected.split()


@pytest.mark.parametrize("score", [captions.bleu, captions.rouge_l, captions.cider_d])
def test_captions_that_cannot_be_scored(score):
    with pytest.raises(ValueError, match="no captions"):
        score([], [])
    with pytest.raises(ValueError, match="1 captions, but references of 2 images"):
        score(split("a"), [split("a"), split("b")])
    with pytest.raises(ValueError, match=r"references\[1\]: an image without a caption"):
        score(split("a", "b"), [split("a"), []])


def test_meteor_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[captions\]'"):
        captions.with_java({"a": "a dog"}, {"a": ["a dog"]})


def test_the_servers_own_code_gives_the_same():
    pytest.importorskip("pycocoevalcap", reason="pip install -e '.[captions]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = random.Random(0)
    words = split("a man the dog on in red blue running ball with two of")[0]
    known = [[rng.choices(words, k=rng.randint(4, 14)) for _ in range(rng.randint(1, 5))] for _ in range(30)]
    written = [several[0][: rng.randint(3, 9)] + rng.choices(words, k=rng.randint(1, 4)) for several in known]
    theirs = {i: [" ".join(each) for each in several] for i, several in enumerate(known)}
    ours = {i: [" ".join(caption)] for i, caption in enumerate(written)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(theirs, ours)
    assert captions.bleu(written, known) == pytest.approx(bleu, abs=1e-8)
    assert captions.cider_d(written, known) == pytest.approx(list(Cider().compute_score(theirs, ours)[1]), abs=1e-10)
    assert captions.rouge_l(written, known) == pytest.approx(Rouge().compute_score(theirs, ours)[0], abs=1e-10)


def test_the_servers_tokenizer_gives_the_same():
    pytest.importorskip("pycocoevalcap", reason="pip install -e '.[captions]'")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said = [
        "A man's dog isn't running, but it's here.",
        "Red/blue (T-shirt) at 10:30 a.m.; $5!",
        "They'd don't - can't",
    ]
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(said)})
    assert [captions.words(text) for text in said] == [found[i][0].split() for i in range(len(said))]


@pytest.mark.slow
def test_meteor_runs_where_the_extra_and_java_are():
    pytest.importorskip("pycocoevalcap", reason="pip install -e '.[captions]'")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    known = {"a": ["a dog runs on the beach", "a dog running"], "b": ["two cats on a sofa"]}
    same = captions.with_java({"a": "a dog runs on the beach", "b": "two cats on a sofa"}, known)
    other = captions.with_java({"a": "two cats on a sofa", "b": "a dog runs on the beach"}, known)
    assert same["METEOR"] == pytest.approx(1.0) and other["METEOR"] < 0.2
