"""A pre-trained model starts each task's model with the same tensors in the same places as the reference does."""

import pytest
import torch
from reference import Golden, converted, read, same_names_and_shapes, swin
from torch import nn

from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.text import TextConfig
from xvlm.models.xvlm import XVLM, XVLMConfig

# Heads and looks of each task's model; those with a decoder are models of their own.
MODELS = {
    "retrieval": (("image_projection", "text_projection", "temperature", "itm_head"), 1),
    "bbox": (("box_head",), 1),
    "bbox_pretrain": (("box_head",), 1),
    "nlvr": (("truth_head",), 2),
    "nlvr_pretrain": (("image_projection", "assignment_head"), 2),
    "vqa": (),
    "captioning": (),
    "captioning_pretrain": (),
}


def start(task: str, pretrained: XVLM, decoder_layers: int, folder) -> nn.Module:
    """The task's model, started from a pre-trained one."""
    if MODELS[task]:
        heads, looks = MODELS[task]
        pretrained.save_pretrained(folder)
        text = pretrained.config.text.model_copy(update={"looks": looks})
        config = pretrained.config.model_copy(update={"heads": heads, "text": text})
        return initial_model(config, InitConfig(model=str(folder)))[0]
    return Answerer.of(pretrained, decoder_layers) if task == "vqa" else Captioner.of(pretrained)


@pytest.mark.parametrize("task", MODELS)
def test_every_tensor_starts_where_the_reference_has_it(goldens, tmp_path, task):
    source = read(goldens / "load_maps/load_maps.json")["tasks"][task]["source"]
    golden = Golden(goldens / "pretrain_swin")
    # Each pre-trained tensor is filled with a number, from 2 on: nothing that starts fresh has such values.
    names = list(golden.state)
    tied = dict(reversed(pair) for pair in golden.manifest["tied_keys"])
    number = {name: float(2 + names.index(tied.get(name, name))) for name in names}
    model = golden.xvlm()
    model.load_state_dict(converted({name: torch.full_like(golden.state[name], number[name]) for name in names}, model))
    started = start(task, model, golden.config["num_dec_layers"], tmp_path)

    theirs = {name: torch.tensor(-1.0 if origin is None else number[origin]) for name, origin in source.items()}
    expected, state = converted(theirs, started), started.state_dict()
    assert state.keys() == expected.keys()
    for name, origin in expected.items():
        if origin == -1:
            assert state[name].max() <= 1, name
        else:
            assert state[name].unique().tolist() == [origin], name


def test_every_task_of_the_reference_is_started(goldens):
    assert read(goldens / "load_maps/load_maps.json")["tasks"].keys() == MODELS.keys()


FULL_SIZE = {
    "retrieval_swin384": "retrieval",
    "grounding_bbox_swin384": "bbox",
    "nlvr_swin384": "nlvr",
    "nlvr_pretrain_swin384": "nlvr_pretrain",
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size(goldens, name):
    heads, looks = MODELS[FULL_SIZE[name]]
    config = XVLMConfig(vision=swin(384), text=TextConfig(looks=looks), heads=heads)
    same_names_and_shapes(goldens, name, lambda: XVLM(config))
