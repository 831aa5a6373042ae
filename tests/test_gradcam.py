"""Heat to boxes by hand, Grad-CAM against closed forms and against the whole graph."""

import pytest
import tiny
import torch
from einops import rearrange

from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.grounder import Method
from xvlm.types import Proposals, Texts
from xvlm.zeroshot import gradcam
from xvlm.zeroshot.gradcam import (
    GradCAM,
    GradCAMConfig,
    box_around,
    heat_in_cells,
    heat_in_pixels,
    heat_maps,
    score,
    token_maps,
    word_maps,
)


def proposals(boxes_xyxy, size=(120, 120), scores=None) -> Proposals:
    boxes_xyxy = torch.tensor(boxes_xyxy, dtype=torch.float)
    scores = torch.ones(len(boxes_xyxy)) if scores is None else torch.tensor(scores)
    return Proposals(boxes_xyxy, scores, size)


# From a heat map to a box.


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_the_box_that_the_heat_fills_wins_whatever_else_is_proposed(alpha):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        heat = torch.zeros(12, 12)
        heat[3:8, 2:6] = 1
        corner = torch.rand(30, 2, generator=generator) * 80
        random = torch.cat([corner, corner + 5 + torch.rand(30, 2, generator=generator) * 35], 1)
        planted = torch.tensor([[20.0, 30.0, 60.0, 80.0]])
        proposed = Proposals(torch.cat([random, planted]), torch.ones(31), (120, 120))
        assert score(heat, proposed, alpha).argmax() == 30


def test_the_size_prior_at_its_ends_ties_what_contains_the_heat_and_what_lies_in_it():
    heat = torch.zeros(12, 12)
    heat[3:8, 2:6] = 1
    around = proposals([[20, 30, 60, 80], [10, 20, 70, 90], [0, 0, 120, 120]])
    inside = proposals([[20, 30, 60, 80], [30, 40, 50, 60], [25, 35, 45, 72]])
    for proposed, alpha in ((around, 0.0), (inside, 1.0)):
        worth = score(heat, proposed, alpha)
        torch.testing.assert_close(worth, worth[:1].expand(3))
    assert score(heat, inside, 0.0).argmax() == 0 and score(heat, around, 1.0).argmax() == 0


def test_even_heat_prefers_the_largest_by_the_root_of_its_area():
    proposed = proposals([[0, 0, 60, 60], [0, 0, 120, 120], [5, 5, 15, 25]])
    worth = score(torch.full((6, 6), 0.3), proposed, 0.5)
    areas = torch.tensor([3600.0, 14400.0, 200.0])
    torch.testing.assert_close(worth / worth[0], (areas / areas[0]).sqrt())


def test_confidence_multiplies_and_a_factor_on_the_heat_changes_no_order():
    twins = proposals([[0, 0, 60, 60]] * 2, scores=[0.4, 0.8])
    worth = score(torch.rand(6, 6), twins, 0.5)
    torch.testing.assert_close(worth[1], 2 * worth[0])
    heat, proposed = torch.rand(6, 6), proposals([[0, 0, 30, 60], [20, 40, 90, 99], [60, 60, 120, 120]])
    assert torch.equal(score(heat, proposed, 0.5).argsort(), score(7 * heat, proposed, 0.5).argsort())


def test_moving_map_and_boxes_by_a_cell_moves_the_answer():
    heat = torch.zeros(6, 6)
    heat[1:3, 1:4] = torch.rand(2, 3) + 0.1
    boxes_xyxy = torch.tensor([[20.0, 20, 80, 60], [30, 25, 70, 70], [10, 0, 90, 60]])
    here = score(heat, Proposals(boxes_xyxy, torch.ones(3), (120, 120)), 0.5)
    moved = Proposals(boxes_xyxy + 20, torch.ones(3), (120, 120))
    torch.testing.assert_close(score(heat.roll((1, 1), (0, 1)), moved, 0.5), here)


def test_an_image_that_is_not_square():
    heat = torch.zeros(2, 4)
    heat[0, 3] = 1.0
    heat[1, 0] = 0.5
    wide = proposals([[300, 0, 400, 50], [350, 0, 400, 100], [0, 25, 200, 100]], size=(400, 100))
    torch.testing.assert_close(heat_in_cells(heat, wide), torch.tensor([1.0, 0.5, 0.5]))


def test_pixels_are_summed_between_truncated_edges():
    heat = torch.rand(4, 4)
    proposed = proposals([[3.7, 2.2, 20.9, 15.5], [0, 0, 40, 30]], size=(40, 30))
    enlarged = torch.nn.functional.interpolate(heat[None, None], (30, 40), mode="bicubic")[0, 0]
    by_hand = torch.stack([enlarged[2:15, 3:20].sum(), enlarged.sum()])
    torch.testing.assert_close(heat_in_pixels(heat, proposed), by_hand, atol=1e-3, rtol=1e-4)


def test_cold_maps_have_an_answer():
    cold = proposals([[0, 0, 60, 60], [0, 0, 120, 120]])
    assert score(-torch.ones(4, 4), cold, 0.5).argmax() == 0  # the least cold, not a box of zeros
    assert box_around(torch.zeros(4, 4), 0.5).tolist() == [0, 0, 1, 1]
    heat = torch.zeros(4, 8)
    heat[1, 2] = heat[2, 5] = 1.0
    heat[3, 7] = 0.4
    assert box_around(heat, 0.5).tolist() == [2 / 8, 1 / 4, 6 / 8, 3 / 4]


# Grad-CAM.


def question(count: int = 2):
    model, batch = tiny.model(), tiny.batch(images=2, per_image=1, whole=True)
    return model, batch.texts, model.encode_image(batch.images), torch.arange(count) % 2


def test_a_logit_linear_in_the_attention_has_its_coefficients_for_gradient(monkeypatch):
    """The match logit is replaced by sum(c * A), and what bypasses A changes nothing."""
    model, texts, concepts, about = question()
    torch.manual_seed(1)
    seen = {}

    def linear(fused):
        attention = model.cross.layers[0].cross_attention.map
        seen["map"], seen["c"] = attention.detach(), torch.randn_like(attention)
        per_text = torch.zeros(2, dtype=attention.dtype).index_add(
            0, texts.mask.nonzero()[:, 0], (seen["c"] * attention).sum((1, 2))
        )
        logit = per_text + fused.first.detach().sum(1)
        return torch.stack([-logit, logit], 1)

    monkeypatch.setattr(model, "match", linear)
    heat, _ = heat_maps(model, texts, concepts, about, 0)
    words = (seen["map"] * seen["c"].clamp(min=0)).mean(1)[:, 1:]
    lengths = texts.mask.sum(1).tolist()
    expected = torch.stack([part.mean(0) for part in words.split(lengths)]).view(2, *concepts.grid)
    torch.testing.assert_close(heat, expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_equal_to_a_backward_pass_through_the_whole_graph(layer):
    model, texts, concepts, about = question()
    heat, presence = heat_maps(model, texts, concepts, about, layer)
    fused = model.fuse(model.encode_text(texts), model.encode_image(tiny.batch(images=2, per_image=1).images), about,
                       keep_map=layer)  # fmt: skip
    attention = model.cross.layers[layer].cross_attention.take_map()
    attention.retain_grad()
    logits = model.match(fused)
    logits[:, 1].sum().backward()
    cam = (attention * attention.grad.clamp(min=0)).mean(1)[:, 1:].detach()
    by_hand = torch.stack([part.mean(0) for part in cam.split(texts.mask.sum(1).tolist())])
    torch.testing.assert_close(heat, rearrange(by_hand, "t (r c) -> t r c", r=4), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(presence, logits.detach().softmax(1)[:, 1])


def test_nothing_is_left_behind_and_frozen_models_work():
    model, texts, concepts, about = question()
    expected, _ = heat_maps(model, texts, concepts, about, 1)
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.cross_attention.map is None for layer in model.cross.layers)
    with torch.no_grad():
        frozen, _ = heat_maps(model.requires_grad_(False), texts, model.encode_image(
            tiny.batch(images=2, per_image=1, whole=True).images), about, 1)  # fmt: skip
    torch.testing.assert_close(frozen, expected)


def test_an_error_on_the_way_leaves_no_map_behind(monkeypatch):
    model, texts, concepts, about = question()

    def broken(_fused):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "match", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        heat_maps(model, texts, concepts, about, 1)
    assert all(layer.cross_attention.map is None for layer in model.cross.layers)


def test_many_texts_equal_one_at_a_time_and_padding_changes_nothing():
    model, texts, concepts, about = question()
    together, _ = heat_maps(model, texts, concepts, about, 1)
    for i in range(2):
        length = int(texts.mask[i].sum())
        alone = Texts(texts.ids[i : i + 1, :length], texts.mask[i : i + 1, :length])
        single, _ = heat_maps(model, alone, concepts, about[i : i + 1], 1)
        torch.testing.assert_close(single[0], together[i], atol=1e-6, rtol=1e-4)


def test_chosen_words_alone_count_and_all_do_where_none_is_chosen():
    model, texts, concepts, about = question()
    each = []
    for word in range(texts.mask.shape[1]):
        only = torch.zeros_like(texts.mask)
        only[0, word] = True
        each.append(heat_maps(model, texts, concepts, about, 1, only)[0])
    chosen = torch.zeros_like(texts.mask)
    chosen[0, [0, 1, 2]] = True  # [CLS] and a word of two pieces
    found, _ = heat_maps(model, texts, concepts, about, 1, chosen)
    torch.testing.assert_close(found[0], torch.stack([each[word][0] for word in (0, 1, 2)]).mean(0))
    torch.testing.assert_close(found[1], heat_maps(model, texts, concepts, about, 1)[0][1])


def test_each_word_has_the_mean_of_its_tokens_and_their_mean_is_the_phrase():
    processor = Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32))
    text = tiny.TEXT.model_copy(update={"vocab_size": processor.vocab_size, "max_positions": 40})
    model = tiny.model(tiny.CONFIG.model_copy(update={"text": text}))
    with torch.no_grad():
        concepts = model.encode_image(tiny.batch(images=1, per_image=1, whole=True).images)
    phrase = "the zebra star"  # a word of pieces between two whole ones
    found = word_maps(model, processor, phrase, concepts, 0)
    assert [word for word, _ in found] == ["[CLS]", "the", "zebra", "star"]
    assert all(heat.max() > 0 for _, heat in found)
    last = word_maps(model, processor, phrase, concepts, len(model.cross.layers) - 1)
    assert [bool(heat.max() > 0) for _, heat in last] == [True, False, False, False]  # the head reads [CLS] alone
    texts, about = processor.texts([phrase]), torch.zeros(1, dtype=torch.long)
    spans = [slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 8)]
    assert texts.mask.sum() == 8
    for span, (_, heat) in zip(spans, found, strict=True):
        words = torch.zeros_like(texts.mask)
        words[:, span] = True
        torch.testing.assert_close(heat, heat_maps(model, texts, concepts, about, 0, words)[0][0])
    weights = torch.tensor([1.0, 1, 5, 1])
    mean = (torch.stack([heat for _, heat in found]) * weights[:, None, None]).sum(0) / 8
    torch.testing.assert_close(heat_maps(model, texts, concepts, about, 0)[0][0], mean)


def test_words_that_cleaning_shortens_or_takes_apart_keep_their_own_tokens():
    """Of "man's T-shirt" cleaning leaves three words; counting those of the written text would be one short."""
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "man", "##s", "t", "sh", "##irt", "red"]
    processor = Processor.from_vocabulary(lines, ProcessorConfig(image_size=32))
    model = tiny.model()
    with torch.no_grad():
        concepts = model.encode_image(tiny.batch(images=1, per_image=1, whole=True).images)
    found = dict(word_maps(model, processor, "man's T-shirt, red!", concepts, 0))
    assert list(found) == ["[CLS]", "mans", "t", "shirt", "red"]
    texts, about = processor.texts(["mans t shirt red"]), torch.zeros(1, dtype=torch.long)
    tokens, _ = token_maps(model, texts, concepts, about, 0)
    for word, span in (("mans", slice(1, 3)), ("t", slice(3, 4)), ("shirt", slice(4, 6)), ("red", slice(6, 7))):
        torch.testing.assert_close(found[word], tokens[span].mean(0))


def test_inference_and_training_mode_are_refused():
    model, texts, concepts, about = question()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode has none"):
        heat_maps(model, texts, concepts, about, 1)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        heat_maps(model.train(), texts, concepts, about, 1)
    assert GradCAM(GradCAMConfig(), model).layer == 1  # of two, the upper; of six, the fourth
    with pytest.raises(ValueError, match=r"gradcam\.layer is 2, but the cross encoder has 2 layers"):
        GradCAM(GradCAMConfig(layer=2), model)


# As a grounder.


def test_it_answers_with_proposals_best_first_or_with_its_own_box(monkeypatch):
    model, texts, _, about = question()
    method = GradCAM(GradCAMConfig(layer=1), model)
    assert isinstance(method, Method)
    heat = torch.zeros(2, 4, 4)
    heat[:, 1, 2] = 1.0
    monkeypatch.setattr(gradcam, "heat_maps", lambda *_: (heat, torch.tensor([0.25, 0.75])))
    images = tiny.batch(images=2, per_image=1, whole=True).images
    proposed = proposals([[0, 0, 80, 60], [40, 15, 60, 30]], size=(80, 60))
    nothing = Proposals(torch.zeros(0, 4), torch.zeros(0), (80, 60))
    first, second = method.ground(texts, method.encode(images, [proposed, nothing]), about)
    torch.testing.assert_close(first.boxes_xyxy, torch.tensor([[0.5, 0.25, 0.75, 0.5], [0, 0, 1, 1]]))
    assert first.scores[0] > first.scores[1] and (first.presence, second.presence) == (0.25, 0.75)
    assert second.boxes_xyxy.tolist() == [[0.5, 0.25, 0.75, 0.5]]
    assert torch.equal(first.heat, heat[0])
    assert method.ground(texts, method.encode(images), about)[0].boxes_xyxy.shape == (1, 4)
