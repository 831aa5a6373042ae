"""Reference arrays of a model with a decoder: what the tests of answers and of captions share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from xvlm.models import convert
from xvlm.models.xvlm import load_strictly
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
        numbered = {name: torch.full_like(self.state[name], i, dtype=torch.float64) for i, name in enumerate(names)}
        origin = convert.official(numbered, self.text_layers)
        found = {names[int(origin[name].flatten()[0])]: p.grad.flatten() for name, p in model.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            norm = expected[name]["norm"]
            if norm > 1e-6:  # below, the true gradient is zero (biases of attention keys)
                assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
                probe = gradient.double() @ torch.arange(len(gradient), dtype=torch.float64).cos()
                assert probe.item() == pytest.approx(expected[name]["probe"], abs=1e-3 * norm), name


def whole_images(count: int, size: int) -> Regions:
    """One text about each image."""
    return Regions(
        torch.arange(count),
        torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1),
        torch.tensor([[0.0, 0.0, size, size]]).repeat(count, 1),
        torch.ones(count, dtype=torch.bool),
    )
