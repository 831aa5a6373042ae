"""Words: cleaning and masking against the reference, tokenising, and the tokenizer's way to disk and back."""

import json
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xvlm.config import ConfigError
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.words import WordMasking, choose_masked, clean_caption, clean_question, mask_words

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "rid", "##ing", "two", "horse", "##s", "its"]


@pytest.fixture
def functions(goldens):
    return json.loads((goldens / "functions" / "functions.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return Processor.from_vocabulary(VOCABULARY, ProcessorConfig(max_tokens=6))


# Cleaning.


def test_captions_are_cleaned_as_in_the_reference(functions):
    assert functions["pre_caption"] and functions["pre_caption_error"]
    for row in functions["pre_caption"]:
        assert clean_caption(row["text"], row["max_words"]) == row["result"]
    for text in functions["pre_caption_error"]:
        with pytest.raises(ValueError, match="no words"):
            clean_caption(text, 30)


def test_questions_are_cleaned_as_in_the_reference(functions):
    assert functions["pre_question"]
    for row in functions["pre_question"]:
        assert clean_question(row["text"], row["max_words"]) == row["result"]


def test_punctuation_is_deleted_not_replaced():
    assert clean_caption("It's a well-known a,b  <person>\n", 40) == "its a well known ab person"
    assert clean_question("...", 40) == ""


# Masking.


def test_masking_draws_as_the_reference(functions):
    vocabulary = functions["tokenizer"]["vocab"]
    rows = functions["text_masking"]["rows"]
    assert rows
    for row in rows:
        tokens = row["tokens"].split()
        continues = [token.startswith("##") for token in tokens]
        config = WordMasking(max_masked=4, whole_word=row["whole_word"])
        assert choose_masked(continues, config, Random(row["seed"])) == row["pos"]
        ids = [vocabulary.index(token) if token in vocabulary else len(vocabulary) for token in tokens]
        mask = vocabulary.index("[MASK]")
        masked, hidden = mask_words(ids, continues, config, Random(row["seed"]), mask, len(vocabulary))
        assert [i for i, h in enumerate(hidden) if h] == sorted(row["pos"])
        shown = [token if ids[i] == masked[i] else vocabulary[masked[i]] for i, token in enumerate(tokens)]
        assert " ".join(shown) == row["masked"]


@pytest.mark.parametrize(
    ("lengths", "count"), [((2, 5), 1), ((6, 10), 2), ((11, 13), 3), ((14, 18), 4), ((19, 21), 5), ((30, 40), 8)]
)
def test_how_many_are_hidden(lengths, count):
    for length in range(lengths[0], lengths[1] + 1):
        assert len(choose_masked([False] * length, WordMasking(), Random(0))) == min(count, length - 1)


@given(st.lists(st.booleans(), max_size=39), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_the_count_is_exact_and_the_first_token_stays(rest, seed, skipgram, whole_word):
    continues = [False, *rest]
    config = WordMasking(skipgram_probability=skipgram, whole_word=whole_word)
    chosen = choose_masked(continues, config, Random(seed))
    assert len(set(chosen)) == len(chosen) == min(8, max(1, round(len(continues) / 4)), len(rest))
    assert all(0 < position < len(continues) for position in chosen)


def test_whole_words_are_hidden_together():
    continues = [False] + [False, True] * 16  # words of two tokens
    for seed in range(50):
        chosen = set(choose_masked(continues, WordMasking(skipgram_probability=0), Random(seed)))
        assert all((position + (1 if position % 2 else -1)) in chosen for position in chosen)
    config = WordMasking(skipgram_probability=0, whole_word=False)
    apart = [set(choose_masked(continues, config, Random(seed))) for seed in range(50)]
    assert any(position % 2 and position + 1 not in chosen for chosen in apart for position in chosen)


def test_runs_of_words_are_hidden_at_their_rate():
    def neighbours(probability: float) -> int:
        config = WordMasking(skipgram_probability=probability)
        rows = [set(choose_masked([False] * 33, config, Random(seed))) for seed in range(200)]
        return sum(position + 1 in row for row in rows for position in row)

    assert neighbours(0.0) < neighbours(0.5) < neighbours(1.0)


def test_hidden_words_are_masked_replaced_or_kept():
    ids, continues, kinds = list(range(100, 133)), [False] * 33, Counter()
    for seed in range(2000):
        masked, hidden = mask_words(ids, continues, WordMasking(), Random(seed), mask_id=4, vocab_size=100)
        for before, after, h in zip(ids, masked, hidden, strict=True):
            kind = "kept" if before == after else "mask" if after == 4 else "other"
            kinds[kind if h else f"{kind} in sight"] += 1
    assert kinds["mask in sight"] == kinds["other in sight"] == 0
    total = 2000 * 8
    assert kinds["mask"] / total == pytest.approx(0.8 + 0.1 / 100, abs=0.01)
    assert kinds["other"] / total == pytest.approx(0.1, abs=0.01)
    assert kinds["kept"] / total == pytest.approx(0.1, abs=0.01)


def test_a_text_of_one_token_has_nothing_to_hide():
    assert mask_words([2], [False], WordMasking(), Random(0), 4, 10) == ([2], [False])


# Tokenising.


def test_tokens_are_the_references(functions):
    vocabulary = functions["tokenizer"]["vocab"]
    processor = Processor.from_vocabulary(vocabulary, ProcessorConfig())
    assert functions["tokenizer"]["rows"]
    for row in functions["tokenizer"]["rows"]:
        ids = processor.tokenizer(row["text"], add_special_tokens=False).input_ids
        assert processor.tokenizer.convert_ids_to_tokens(ids) == row["tokens"]
        assert [vocabulary.index("[CLS]"), *ids] == row["without_sep"]
        assert processor.tokenizer(row["text"]).input_ids == row["with_sep"]


def test_texts_are_cleaned_cut_and_padded_to_the_longest(processor):
    texts = processor.texts(["A man!", "a man riding two horses and", "IT'S"])
    assert texts.ids.tolist() == [[2, 5, 6, 0, 0, 0], [2, 5, 6, 7, 8, 9], [2, 12, 0, 0, 0, 0]]
    assert torch.equal(texts.mask, texts.ids != 0)
    assert processor.texts(["a", "a man"]).ids.shape == (2, 3)
    with pytest.raises(ValueError, match="no words"):
        processor.texts(["a", "?!"])
    with pytest.raises(ValueError, match="no texts"):
        processor.texts([])


def test_which_tokens_continue_a_word(processor):
    ids, continues = processor.encode("riding horses")
    assert ids == [2, 7, 8, 10, 11]
    assert continues == [False, False, True, False, True]


def test_end_token_is_counted_within_the_limit():
    processor = Processor.from_vocabulary(VOCABULARY, ProcessorConfig(max_tokens=5, end_token=True))
    assert processor.encode("a man riding two") == ([2, 5, 6, 7, 3], [False] * 5)
    assert processor.encode("a") == ([2, 5, 3], [False] * 3)


def test_any_fast_tokenizer_will_do():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "<mask>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "Ġm", "Ġma", "Ġman"]
    merges = [("Ġ", "m"), ("Ġm", "a"), ("Ġma", "n")]
    split = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    split.enable_truncation(2)
    split.enable_padding()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, cls_token="<s>", pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )
    processor = Processor(ProcessorConfig(), tokenizer)
    ids, continues = processor.encode("Man mans")
    assert [pieces[i] for i in ids] == ["<s>", "Ġman", "Ġman", "s"]
    assert continues == [False, False, False, True]
    assert processor.texts(["man mans", "man"]).ids[1].tolist() == [0, pieces.index("Ġman"), 1, 1]
    with pytest.raises(ValueError, match="sep_token"):
        Processor(ProcessorConfig(end_token=True), tokenizer)


# To disk and back.


def test_processor_comes_back_from_its_folder(tmp_path):
    config = ProcessorConfig(image_size=(32, 48), max_tokens=7, mean=(0.5, 0.5, 0.5), end_token=True)
    before = Processor.from_vocabulary(VOCABULARY, config)
    (tmp_path / "config.json").write_text('{"vision": {}}')  # a model lies in the same folder
    before.save_pretrained(tmp_path)
    after = Processor.from_pretrained(tmp_path)
    assert after.config == config
    assert after.encode("two men riding horses") == before.encode("two men riding horses")
    assert (after.vocab_size, after.mask_id, after.pad_id) == (13, 4, 0)


def test_a_field_nobody_knows_is_refused(tmp_path):
    Processor.from_vocabulary(VOCABULARY, ProcessorConfig()).save_pretrained(tmp_path)
    file = tmp_path / "processor.json"
    file.write_text(file.read_text().replace('"max_words"', '"max_word"'))
    with pytest.raises(ConfigError, match=r"processor\.json.*'max_word'.*did you mean 'max_words'"):
        Processor.from_pretrained(tmp_path)


def test_a_bare_vocabulary_file_is_a_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    processor = Processor.from_tokenizer(tmp_path, ProcessorConfig())
    assert processor.encode("A man riding")[0] == [2, 5, 6, 7, 8]
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json or a vocab\.txt"):
        Processor.from_tokenizer(tmp_path, ProcessorConfig())


def test_a_vocabulary_without_special_tokens_or_with_doubles_is_refused():
    with pytest.raises(ValueError, match=r"\[MASK\], \[UNK\]"):
        Processor.from_vocabulary(["[PAD]", "[CLS]", "[SEP]", "a"], ProcessorConfig())
    with pytest.raises(ValueError, match="'man' more than once"):
        Processor.from_vocabulary([*VOCABULARY, "man"], ProcessorConfig())
