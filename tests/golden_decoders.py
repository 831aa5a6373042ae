"""Reference arrays of a model with a decoder: what the tests of answers and of captions share."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_parity import read, text_config, vision_config
from torch import nn

from xvlm.models import convert
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig, load_strictly
from xvlm.types import Regions


class Golden:
    """One case folder: the manifest, inputs, outputs, and the state dict, to be loaded into a model."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            pytest.skip(f"no reference arrays in {folder}")
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.inputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}
        self.outputs = {name: torch.from_numpy(array) for name, array in np.load(folder / "outputs.npz").items()}
        self.state = load_file(folder / "state.safetensors")
        self.text_layers = self.manifest["text_config"]["fusion_layer"]

    def load(self, model: nn.Module) -> None:
        load_strictly(model.eval(), convert.official(self.state, self.text_layers), self.folder)
        assert sum(p.numel() for p in model.parameters()) == self.manifest["num_params"]

    def same_gradients(self, model: nn.Module) -> None:
        """Gradients of every parameter against the norm and the weighted sum that the reference stored."""
        names, expected = list(self.state), self.manifest["grads"]
        origin = convert.official(numbered(self.state), self.text_layers)
        found = {names[int(origin[name].flatten()[0])]: p.grad.flatten() for name, p in model.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            norm = expected[name]["norm"]
            if norm > 1e-6:  # below, the true gradient is zero (biases of attention keys)
                assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
                probe = gradient.double() @ torch.arange(len(gradient), dtype=torch.float64).cos()
                assert probe.item() == pytest.approx(expected[name]["probe"], abs=1e-3 * norm), name


def numbered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes, each filled with the number of its name."""
    return {name: torch.full(state[name].shape, float(i)) for i, name in enumerate(state)}


def starts_as_the_reference(golden: Golden, make: Callable[[XVLM], nn.Module], task: str) -> None:
    """A model made from a pre-trained one takes each tensor from where the reference takes it, or starts it fresh."""
    pretraining = Golden(golden.folder.parent / "pretrain_swin")
    config, text = golden.manifest["config"], text_config(golden.manifest["text_config"])
    vision = vision_config(config, golden.manifest["vision_config"])
    model = XVLM(XVLMConfig(vision=vision, text=text, embed_dim=config["embed_dim"]))
    load_strictly(model, convert.official(numbered(pretraining.state), golden.text_layers), "numbers")
    made = make(model).state_dict()
    source = read(golden.folder.parent / "load_maps/load_maps.json")["tasks"][task]["source"]
    theirs, names = list(pretraining.state), list(golden.state)
    for name, number in convert.official(numbered(golden.state), golden.text_layers).items():
        taken = source[names[int(number.flatten()[0])]]
        assert (made[name] == theirs.index(taken)).all() if taken else made[name].std() < 0.1, name


def same_names_and_shapes(goldens: Path, name: str, make: Callable[[], nn.Module], text_layers: int = 6) -> None:
    """The real-size state dict of the reference fits a model of ours, tensor for tensor."""
    real = read(goldens / "statedict_real.json")["models"][name]
    with torch.device("meta"):  # shapes without memory
        model = make()
        state = {key: torch.empty(about["shape"]) for key, about in real["keys"].items()}
    load_strictly(model, convert.official(state, text_layers), name)
    assert sum(p.numel() for p in model.parameters()) == real["num_params"]


def swin(size: int) -> VisionConfig:
    """The reference's trunk at 224 or 384 pixels."""
    options = {"window_size": size // 32}
    return VisionConfig(trunk="swin_base_patch4_window7_224", image_size=(size, size), options=options)


def whole_images(count: int, size: int) -> Regions:
    """One text about each image."""
    return Regions(
        torch.arange(count),
        torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1),
        torch.tensor([[0.0, 0.0, size, size]]).repeat(count, 1),
        torch.ones(count, dtype=torch.bool),
    )
