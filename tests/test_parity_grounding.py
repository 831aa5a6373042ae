"""Grounding with boxes gives the reference's boxes, losses and gradients, in both its forms."""

import pytest
import torch
from test_parity import Golden, close, same_gradients, same_loss

from xvlm import boxes
from xvlm.tasks.grounding import GroundingConfig, Task
from xvlm.types import Batch, Regions, Texts


@pytest.fixture
def golden(goldens) -> Golden:
    return Golden(goldens / "bbox_swin", heads=("box_head",))


def batch_of(golden: Golden, kind: str) -> Batch:
    """Fine-tuning has an image for each phrase; its pre-training (``pre_``) also several phrases, and whole images."""
    given = {name.removeprefix(kind): array for name, array in golden.inputs.items() if name.startswith(kind)}
    box = given["target_bbox"]
    image = given.get("idx_to_group_img", torch.arange(len(box)))
    whole = given.get("is_image", torch.zeros(len(box))).bool()
    regions = Regions(image, box, boxes.xyxy_to_xywh(boxes.cxcywh_to_xyxy(box)) * golden.size, whole)
    return Batch(given["image"], Texts(given["text_ids"], given["text_atts"].bool()), regions)


def test_parameter_count(golden):
    assert sum(p.numel() for p in golden.model.parameters()) == golden.manifest["num_params"]


@pytest.mark.parametrize("kind", ["", "pre_"])
def test_losses_and_gradients(golden, kind):
    found = Task(GroundingConfig(), golden.model)({"region": batch_of(golden, kind)})
    assert found.keys() == {"region/box_l1", "region/box_giou"}
    same_loss(found["region/box_l1"], golden.outputs[f"{kind}loss_bbox"])
    same_loss(found["region/box_giou"], golden.outputs[f"{kind}loss_giou"])
    total = sum(found.values())
    if not kind:
        same_loss(total, golden.outputs["loss"])
    total.backward()
    same_gradients(golden.gradients(), golden.manifest[f"{kind}grads"])


def test_boxes(golden):
    task, batch = Task(GroundingConfig(), golden.model), batch_of(golden, "")
    expected = golden.outputs["output_coord"]
    with torch.inference_mode():
        words, concepts = golden.model.encode_text(batch.texts), task.encode(batch.images)
        close(task.locate(words, concepts, batch.regions.image), expected)
    for one, box in zip(task.predict(batch), expected, strict=True):
        close(one.boxes_xyxy, boxes.cxcywh_to_xyxy(box[None]).clamp(0, 1))
