"""A pre-trained model starts each task's model with the same tensors in the same places as the reference does."""

import pytest
import torch
from reference import Golden, converted, read
from safetensors.torch import load_file
from torch import nn

from xvlm.models import checkpoints, convert, kinds
from xvlm.models.decoder import Answerer, Captioner
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.xvlm import XVLM

# The reference's loaders, and whose model each of them starts.
LOADERS = {
    "retrieval": "retrieval",
    "bbox": "grounding",
    "bbox_pretrain": "grounding",
    "nlvr": "nlvr",
    "nlvr_pretrain": "nlvr_pretraining",
    "vqa": "vqa",
    "captioning": "captioning",
    "captioning_pretrain": "captioning",
}


def start(task: str, pretrained: XVLM, decoder_layers: int, folder) -> nn.Module:
    """The task's model, started from a pre-trained one."""
    if task in kinds.HEADS:
        pretrained.save_pretrained(folder)
        text = pretrained.config.text.model_copy(update={"looks": kinds.LOOKS.get(task, 1)})
        config = pretrained.config.model_copy(update={"heads": kinds.HEADS[task], "text": text})
        return initial_model(config, InitConfig(model=str(folder)))[0]
    return Answerer.of(pretrained, decoder_layers) if task == "vqa" else Captioner.of(pretrained)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_starts_every_tensor_where_the_reference_has_it(goldens, tmp_path, loader):
    source = read(goldens / "load_maps/load_maps.json")["tasks"][loader]["source"]
    golden = Golden(goldens / "pretrain_swin")
    # Each pre-trained tensor is filled with a number, from 2 on: nothing that starts fresh has such values.
    names = list(golden.state)
    tied = dict(reversed(pair) for pair in golden.manifest["tied_keys"])
    number = {name: float(2 + names.index(tied.get(name, name))) for name in names}
    model = golden.xvlm()
    model.load_state_dict(converted({name: torch.full_like(golden.state[name], number[name]) for name in names}, model))
    started = start(LOADERS[loader], model, golden.config["num_dec_layers"], tmp_path)

    theirs = {name: torch.tensor(-1.0 if origin is None else number[origin]) for name, origin in source.items()}
    expected, state = converted(theirs, started), started.state_dict()
    assert state.keys() == expected.keys()
    for name, origin in expected.items():
        if origin == -1:
            assert state[name].max() <= 1, name
        else:
            assert state[name].unique().tolist() == [origin], name


def test_every_task_of_the_reference_is_started(goldens):
    assert read(goldens / "load_maps/load_maps.json")["tasks"].keys() == LOADERS.keys()


@pytest.mark.parametrize("loader", LOADERS)
def test_an_official_file_starts_every_tensor_where_the_reference_has_it(goldens, loader):
    source = read(goldens / "load_maps/load_maps.json")["tasks"][loader]["source"]
    folder = goldens / "pretrain_swin"
    state, shape = load_file(folder / "state.safetensors"), read(folder / "manifest.json")["text_config"]
    started = checkpoints.official(state, heads=shape["num_attention_heads"], task=LOADERS[loader])
    names = list(source)
    numbered = {name: torch.tensor([i]) for i, name in enumerate(names)}
    expected = convert.official(numbered, started.config.text.text_layers, started.config.text.looks)
    assert expected.keys() == started.state.keys() | set(started.fresh)
    for name, number in expected.items():
        origin = source[names[number]]
        if origin is None:
            assert name in started.fresh
        else:
            assert torch.equal(started.state[name], state[origin]), name
