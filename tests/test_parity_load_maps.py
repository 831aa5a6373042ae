"""A pre-trained model starts each task's model with the same tensors in the same places as the reference does."""

import pytest
import torch
from test_parity import Golden, read

from xvlm.models import convert
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig, load_strictly

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


def start(task: str, pretrained: XVLM, folder) -> torch.nn.Module:
    """The task's model, started from a pre-trained one."""
    if MODELS[task]:
        heads, looks = MODELS[task]
        pretrained.save_pretrained(folder)
        text = pretrained.config.text.model_copy(update={"looks": looks})
        config = pretrained.config.model_copy(update={"heads": heads, "text": text})
        return initial_model(config, InitConfig(model=str(folder)))[0]
    decoder = pytest.importorskip("xvlm.models.decoder")
    return decoder.Answerer.of(pretrained, 2) if task == "vqa" else decoder.Captioner.of(pretrained)


@pytest.mark.parametrize("task", MODELS)
def test_every_tensor_starts_where_the_reference_has_it(goldens, tmp_path, task):
    source = read(goldens / "load_maps/load_maps.json")["tasks"][task]["source"]
    golden = Golden(goldens / "pretrain_swin")
    # Each pre-trained tensor is filled with a number, from 2 on: nothing that starts fresh has such values.
    names = list(golden.state)
    tied = dict(reversed(pair) for pair in golden.manifest["tied_keys"])
    number = {name: float(2 + names.index(tied.get(name, name))) for name in names}
    numbered = {name: torch.full_like(golden.state[name], number[name]) for name in names}
    golden.model.load_state_dict(golden.converted(numbered))
    started = start(task, golden.model, tmp_path).state_dict()

    looks = MODELS[task][1] if MODELS[task] else 1
    layers = golden.text.text_layers
    theirs = {name: torch.tensor(-1.0 if origin is None else number[origin]) for name, origin in source.items()}
    expected = convert.official(theirs, layers, looks)
    assert started.keys() == expected.keys()
    for name, origin in expected.items():
        if origin == -1:
            assert started[name].max() <= 1, name
        else:
            assert started[name].unique().tolist() == [origin], name


FULL_SIZE = {
    "retrieval_swin384": "retrieval",
    "grounding_bbox_swin384": "bbox",
    "nlvr_swin384": "nlvr",
    "nlvr_pretrain_swin384": "nlvr_pretrain",
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size(goldens, name):
    real = read(goldens / "statedict_real.json")["models"][name]
    heads, looks = MODELS[FULL_SIZE[name]]
    vision = VisionConfig(image_size=(384, 384), options={"window_size": 12})
    text = TextConfig(looks=looks)
    with torch.device("meta"):  # shapes without memory
        model = XVLM(XVLMConfig(vision=vision, text=text, heads=heads))
        state = {key: torch.empty(about["shape"]) for key, about in real["keys"].items()}
    load_strictly(model, convert.official(state, text.text_layers, looks), name)
    assert sum(p.numel() for p in model.parameters()) == real["num_params"]
