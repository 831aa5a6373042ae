"""Grounding with boxes gives the reference's boxes, losses and gradients, in both its forms."""

import pytest
import torch
from reference import Golden

from xvlm import boxes
from xvlm.models.xvlm import XVLM
from xvlm.tasks.grounding import GroundingConfig, Task
from xvlm.types import Batch, Regions, Texts

GOLDENS = {"golden": ("bbox_swin",)}


@pytest.fixture(scope="module")
def model(golden) -> XVLM:
    return golden.xvlm(heads=("box_head",))


def batch_of(golden: Golden, kind: str) -> Batch:
    """Fine-tuning has an image for each phrase; its pre-training (``pre_``) also several phrases, and whole images."""
    given = golden.given(kind)
    box = given["target_bbox"]
    image = given.get("idx_to_group_img", torch.arange(len(box)))
    whole = given.get("is_image", torch.zeros(len(box))).bool()
    regions = Regions(image, box, boxes.xyxy_to_xywh(boxes.cxcywh_to_xyxy(box)) * golden.size, whole)
    return Batch(given["image"], Texts(given["text_ids"], given["text_atts"].bool()), regions)


@pytest.mark.parametrize("kind", ["", "pre_"])
def test_losses_and_gradients(golden, model, kind):
    model.zero_grad()
    found = Task(GroundingConfig(), model)({"region": batch_of(golden, kind)})
    assert found.keys() == {"region/box_l1", "region/box_giou"}
    golden.loss(f"{kind}loss_bbox", found["region/box_l1"])
    golden.loss(f"{kind}loss_giou", found["region/box_giou"])
    total = sum(found.values())
    if not kind:
        golden.loss("loss", total)
    total.backward()
    golden.gradients(model, kind)


def test_boxes(golden, model):
    task, batch = Task(GroundingConfig(), model), batch_of(golden, "")
    with torch.inference_mode():
        words, concepts = model.encode_text(batch.texts), task.encode(batch.images)
        golden.close("output_coord", task.locate(words, concepts, batch.regions.image))
    for one, box in zip(task.predict(batch), golden.outputs["output_coord"], strict=True):
        expected = boxes.cxcywh_to_xyxy(box[None]).clamp(0, 1)
        torch.testing.assert_close(one.boxes_xyxy, expected, atol=1e-5, rtol=0)
