"""Greedy and beam search against brute force and by hand, on vocabularies of a few words."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from xvlm.models.generation import GenerationConfig, draw, generate

END = 3


class Table:
    """Logits of the next word, different after every text, and a check that rows are continued as announced."""

    def __init__(self, vocabulary: int = 4, seed: int = 0):
        self.vocabulary, self.seed, self.last = vocabulary, seed, None

    def logits(self, text: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *text)) % 2**31)
        return 2 * torch.randn(self.vocabulary, generator=generator)

    def log_p(self, text: tuple[int, ...]) -> list[float]:
        return self.logits(text).log_softmax(-1).tolist()

    def __call__(self, ids, continued):
        if self.last is not None:
            assert torch.equal(ids[:, :-1], self.last[continued])
        self.last = ids
        return torch.stack([self.logits(tuple(row)) for row in ids.tolist()])


def every_text(table: Table, prompt: list[int], config: GenerationConfig) -> dict[tuple[int, ...], float]:
    """Scores of all texts there can be."""
    scores = {}
    for extra in range(1, config.max_tokens - len(prompt) + 1):
        for words in product(range(table.vocabulary), repeat=extra):
            text = (*prompt, *words)
            ended, whole = words[-1] == END, len(text) == config.max_tokens
            if END in words[:-1] or not (ended or whole) or (ended and len(text) <= config.min_tokens):
                continue
            total = sum(table.log_p(text[:i])[text[i]] for i in range(len(prompt), len(text)))
            # A text ended by its last possible word is one that was found one word earlier, with [SEP] after it.
            scores[text] = total / (len(text) - ended)
    return scores


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_tokens", [0, 4])
def test_enough_beams_find_the_best_text_of_all(seed, min_tokens):
    table, prompts = Table(seed=seed), [[0, 1], [0, 2]]
    config = GenerationConfig(beams=64, max_tokens=5, min_tokens=min_tokens)
    written = generate(table, torch.tensor(prompts), END, config)
    for row, prompt in enumerate(prompts):
        scores = every_text(table, prompt, config)
        best = max(scores, key=scores.get)
        assert tuple(written.texts.ids[row][written.texts.mask[row]].tolist()) == best
        assert written.scores[row].item() == pytest.approx(scores[best], abs=1e-5)


@pytest.mark.parametrize("beams", [2, 3])
def test_a_beam_search_scores_what_it_writes(beams):
    prompts = [[0, 1], [0, 2], [1, 1]]
    config = GenerationConfig(beams=beams, max_tokens=7, min_tokens=0)
    written = generate(Table(5), torch.tensor(prompts), END, config)
    for row, prompt in enumerate(prompts):
        text = tuple(written.texts.ids[row][written.texts.mask[row]].tolist())
        total = sum(Table(5).log_p(text[:i])[text[i]] for i in range(len(prompt), len(text)))
        assert written.scores[row].item() == pytest.approx(total / (len(text) - (text[-1] == END)), abs=1e-5)
        alone = generate(Table(5), torch.tensor([prompt]), END, config)
        assert tuple(alone.texts.ids[0].tolist()) == text


def certain(likely: dict[tuple[int, ...], dict[int, float]], prompt: int):
    """Probabilities of next words by what was written after the prompt; the rest is 1e-6."""

    def next_word(ids, _):
        rows = []
        for row in ids[:, prompt:].tolist():
            p = torch.full((6,), 1e-6)
            for word, probability in likely.get(tuple(row), {END: 1.0}).items():
                p[word] = probability
            rows.append(p.log())
        return torch.stack(rows)

    return next_word


def test_the_length_that_divides_a_score_includes_the_prompt():
    likely = {(): {0: 0.4, 1: 0.3}, (0,): {END: 0.9}, (1,): {1: 0.95}, (1, 1): {1: 0.95}}
    for prompt, best in {1: [1, 1, 1, END], 20: [0, END]}.items():
        config = GenerationConfig(beams=2, max_tokens=prompt + 6, min_tokens=0)
        written = generate(certain(likely, prompt), torch.zeros(1, prompt, dtype=torch.long), END, config)
        assert written.texts.ids[0, prompt:].tolist() == best
    assert math.log(0.3 * 0.95**2) / 4 > math.log(0.4 * 0.9) / 2  # why, after a prompt of one


def greedily(**options) -> list[int]:
    likely = {(): {0: 0.5, END: 0.3, 1: 0.2}, (0,): {0: 0.6, 1: 0.4}, (0, 0): {0: 0.6, 1: 0.4}, (0, 1): {1: 0.9}}
    config = GenerationConfig(beams=1, **{"max_tokens": 4, "min_tokens": 0} | options)
    written = generate(certain(likely, 1), torch.tensor([[5]]), END, config)
    return written.texts.ids[0, 1:].tolist()


def test_greedy_takes_the_likeliest_word_and_stops_in_time():
    assert greedily() == [0, 0, 0]
    assert greedily(close=True) == [0, 0, END]
    assert greedily(repetition_penalty=3.0) == [0, 1, 1]
    likely = certain({(): {END: 0.7, 1: 0.3}}, 1)
    for min_tokens, words in {0: [END], 2: [1, END]}.items():
        config = GenerationConfig(beams=1, max_tokens=6, min_tokens=min_tokens)
        assert generate(likely, torch.tensor([[5]]), END, config).texts.ids[0, 1:].tolist() == words


@pytest.mark.parametrize(("logits", "words"), [([2.0, 1.5], [0, 1, 0]), ([-1.0, -1.5], [0, 1, 0])])
def test_the_repetition_penalty_lowers_logits_of_either_sign(logits, words):
    def next_word(ids, _):
        return torch.tensor([[*logits, -9.0, -9.0, -9.0]]).repeat(len(ids), 1)

    config = GenerationConfig(beams=1, max_tokens=4, min_tokens=0, repetition_penalty=2.0)
    assert generate(next_word, torch.tensor([[4]]), END, config).texts.ids[0, 1:].tolist() == words


def test_finished_texts_are_padded_while_others_grow():
    def next_word(ids, _):
        return torch.nn.functional.one_hot(torch.where(ids[:, 0] == 1, END, 2), 5) * 9.0

    written = generate(next_word, torch.tensor([[1], [2]]), END, GenerationConfig(beams=1, max_tokens=4, min_tokens=0))
    assert written.texts.ids.tolist() == [[1, END, 0, 0], [2, 2, 2, 2]]
    assert written.texts.mask.tolist() == [[True, True, False, False], [True] * 4]
    torch.testing.assert_close(written.scores[0], written.scores[1])  # means: one word, three like it


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match="prompts of 3 tokens leave no room in max_tokens 3"):
        generate(Table(), torch.zeros(1, 3, dtype=torch.long), END, GenerationConfig(max_tokens=3))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("beams", "min_tokens"), [(1, 0), (3, 0), (3, 3), (5, 1)])
def test_without_the_prompt_lengths_count_as_in_current_transformers(seed, beams, min_tokens):
    """The library's own ``generate``, with a small random model."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(seed)
    shape = {"vocab_size": 12, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertLMHeadModel(BertConfig(**shape, intermediate_size=16, is_decoder=True, initializer_range=1.0)).eval()
    prompts = torch.tensor([[1, 2, 4], [1, 5, 6], [1, 7, 7]])
    config = GenerationConfig(beams=beams, max_tokens=7, min_tokens=min_tokens, count_prompt=False)

    def next_word(ids, _continued):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]

    written = generate(next_word, prompts, END, config)
    theirs = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=beams,
        max_new_tokens=7,
        min_new_tokens=min_tokens or None,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for ids, mask, known in zip(written.texts.ids, written.texts.mask, theirs.sequences, strict=True):
        assert ids[mask].tolist() == known[: mask.sum()].tolist()
        assert set(known[mask.sum() :].tolist()) <= {0, END}  # filled up
    if beams > 1:
        torch.testing.assert_close(written.scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)


def test_texts_are_drawn_as_often_as_they_are_likely():
    table, count = Table(), 4000
    uniform = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    drawn = draw(table, torch.tensor([[0, 1]]).repeat(count, 1), END, 4, uniform)
    total = drawn.log_p.sum(1)
    words = drawn.texts.mask.sum(1)
    seen = Counter(tuple(ids[:n].tolist()) for ids, n in zip(drawn.texts.ids, words.tolist(), strict=True))
    for ids, n, score in zip(drawn.texts.ids[:100], words[:100].tolist(), total[:100].tolist(), strict=True):
        text = tuple(ids[:n].tolist())
        assert score == pytest.approx(sum(table.log_p(text[:i])[text[i]] for i in range(2, n)), abs=1e-4)
        share = math.exp(score)
        assert abs(seen[text] / count - share) < 4 * math.sqrt(share * (1 - share) / count)
        assert END not in text[:-1]
    again = draw(Table(), torch.tensor([[0, 1]]).repeat(count, 1), END, 4, uniform)
    assert torch.equal(again.texts.ids, drawn.texts.ids)
