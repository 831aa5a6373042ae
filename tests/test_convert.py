"""Names of other systems: what fits finds its place, what does not is named."""

import pytest
import torch
from torch import nn

from xvlm.models import convert
from xvlm.models.xvlm import load_strictly


def test_query_key_and_value_become_one_matrix():
    state = {f"encoder.layers.7.self_attn.{part}_proj.bias": torch.full((2,), i) for i, part in enumerate("vkq")}
    assert {name: t.tolist() for name, t in convert.clip_vit(state).items()} == {
        "blocks.7.attn.qkv.bias": [2, 2, 1, 1, 0, 0]
    }


def test_leftovers_of_both_sides_are_listed():
    names = ["vision_encoder.class_embedding", "vision_encoder.encoder.layers.0.self_attn.q_proj.bias"]
    names += ["text_encoder.roberta.surprise", "third_head.weight"]
    model = nn.ModuleDict({"temperature": nn.Linear(1, 1, bias=False)})
    with pytest.raises(ValueError) as error:
        load_strictly(model, convert.official({name: torch.zeros(2) for name in names}, 2), "there")
    assert str(error.value) == (
        "there: missing temperature.weight; unexpected text_encoder.roberta.surprise; unexpected third_head.weight; "
        "unexpected vision.trunk.cls_token; unexpected vision.trunk.encoder.layers.0.self_attn.q_proj.bias"
    )
