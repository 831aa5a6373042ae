"""The grounder: one image, many phrases, answers in its pixels; a batch answers as each phrase does alone."""

import pytest
import tiny
import torch
from PIL import Image

from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.grounder import Grounder
from xvlm.tasks import grounding, pretraining
from xvlm.zeroshot.gradcam import GradCAM, GradCAMConfig

LONG = "the small striped red disc to the left of the large plain blue star partly covering the dotted ring"
PHRASES = ["star", LONG, "the red disc", "a star", LONG.replace("red", "pink"), "the largest object on the left side"]


@pytest.fixture(scope="module")
def model():
    text = tiny.TEXT.model_copy(update={"vocab_size": len(scenes.vocabulary()), "max_positions": 40})
    return tiny.model(tiny.CONFIG.model_copy(update={"text": text}))


@pytest.fixture(scope="module")
def processor():
    return Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32, max_tokens=30))


@pytest.fixture
def picture():
    return Image.fromarray(scenes.draw(scenes.sample_scene(scenes.SceneConfig(), "test", 0), 96)).resize((96, 60))


METHODS = {
    "pretraining": lambda model: pretraining.Task(pretraining.PretrainingConfig(), model),
    "grounding": lambda model: grounding.Task(grounding.GroundingConfig(), model),
    "gradcam": lambda model: GradCAM(GradCAMConfig(layer=1), model),
}


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_very_different_lengths_in_one_batch_are_answered_as_each_alone(method, model, processor, picture):
    grounder = Grounder(METHODS[method](model), processor)
    grounder.set_image(picture)
    lengths = processor.texts(PHRASES).mask.sum(1)
    assert lengths.min() == 2 and lengths.max() > 18
    for phrase, found in zip(PHRASES, grounder.predict_all(PHRASES), strict=True):
        alone = grounder.predict(phrase)
        torch.testing.assert_close(found.boxes_xyxy, alone.boxes_xyxy, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.scores, alone.scores)
        assert found.presence == pytest.approx(alone.presence, abs=1e-6)
        if found.heat is not None:
            torch.testing.assert_close(found.heat, alone.heat)


def test_an_image_is_encoded_once_and_boxes_are_in_its_pixels(model, processor, picture, monkeypatch):
    method, seen = METHODS["grounding"](model), []
    monkeypatch.setattr(
        model, "encode_image", lambda images, encode=model.encode_image: seen.append(1) or encode(images)
    )
    grounder = Grounder(method, processor)
    with pytest.raises(RuntimeError, match="call set_image first"):
        grounder.predict("a star")
    grounder.set_image(picture)
    found = grounder.predict_all(PHRASES)
    assert len(seen) == 1 and grounder.predict_all([]) == []
    with torch.no_grad():
        concepts = method.encode(processor.pixel_values(picture)[None])
        normalised = method.ground(processor.texts(PHRASES), concepts, torch.zeros(len(PHRASES), dtype=torch.long))
    assert [each.phrase for each in found] == PHRASES
    for each, share in zip(found, normalised, strict=True):
        torch.testing.assert_close(each.boxes_xyxy, share.boxes_xyxy * torch.tensor([96.0, 60, 96, 60]))


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("", "phrase 1, '': has no words"),
        ("?!", r"phrase 1, '\?!': has no words"),
        ("star " * 31, "phrase 1, 'star .*: too long; the processor keeps 40 words and 30 tokens"),
        ("unheardofword " * 3, "phrase 1, 'unheard.*: too long"),  # few words, many pieces
    ],
)
def test_phrases_that_cannot_be_asked_are_named(phrase, message, model, processor, picture):
    grounder = Grounder(METHODS["grounding"](model), processor)
    grounder.set_image(picture)
    with pytest.raises(ValueError, match=message):
        grounder.predict_all(["a star", phrase])


def test_what_fits_is_what_is_kept(processor):
    for count in range(26, 34):
        text = " ".join(["star"] * count)
        kept = len(processor.encode(text)[0]) - 1  # without [CLS]
        assert processor.fits(text) == (kept == count)
