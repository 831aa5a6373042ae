"""Reference arrays: a folder of them, the model of ours it belongs to, and how far our numbers are from its.

Sizes, seeds and batches are those of the folder; nothing here knows them.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from xvlm.models import convert
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import PRETRAINING_HEADS, XVLM, XVLMConfig, load_strictly
from xvlm.types import Regions

OURS = Path(__file__).parent / "goldens"  # small folders of the same layout, see the README there

KINDS = ("arrays", "losses", "gradients")
# Folder -> kind -> name -> largest difference: what the tests have compared so far.
DIFFERENCES: dict[Path, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))


def vision_config(config: dict, vision: dict) -> VisionConfig:
    """Ours for the reference's: ``config`` names the tower, ``vision`` or ``vit_overrides`` shape it."""
    size = (config["image_res"], config["image_res"])
    if config["use_swin"]:
        options = {key: vision[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
        return VisionConfig(trunk="swin_base_patch4_window7_224", image_size=size, options=options)
    if config["use_clip_vit"]:
        width = vision["vision_width"]
        options = {
            "patch_size": vision["patch_size"],
            "embed_dim": width,
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_ratio": (vision["intermediate_size"] + 0.5) / width,  # timm rounds the product down
            "act_layer": vision["hidden_act"],
        }
        local = vision["local_attn_depth"]
        return VisionConfig(trunk="vit_base_patch16_clip_224", image_size=size, options=options, local_layers=local)
    options = {"patch_size": config["patch_size"], "local_attn_depth": 4} | config.get("vit_overrides", {})
    local = options.pop("local_attn_depth")
    return VisionConfig(trunk="vit_base_patch16_224", image_size=size, options=options, local_layers=local)


def text_config(text: dict) -> TextConfig:
    return TextConfig(
        vocab_size=text["vocab_size"],
        dim=text["hidden_size"],
        heads=text["num_attention_heads"],
        feed_forward=text["intermediate_size"],
        text_layers=text["fusion_layer"],
        cross_layers=text["num_hidden_layers"] - text["fusion_layer"],
        max_positions=text["max_position_embeddings"],
        position_offset=text["pad_token_id"] + 1 if text["model_type"] == "roberta" else 0,
        token_types=text["type_vocab_size"],
        norm_eps=text["layer_norm_eps"],
    )


class Golden:
    """One case folder: the manifest, inputs, outputs and weights; each comparison is also noted down."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            pytest.skip(f"no reference arrays in {folder}")
        self.folder = folder
        self.manifest = read(folder / "manifest.json")
        self.inputs, self.outputs = (arrays(folder / file) for file in ("inputs.npz", "outputs.npz"))
        self.state = load_file(folder / "state.safetensors")
        self.config = self.manifest["config"]
        self.size = self.config["image_res"]
        self.text = text_config(self.manifest["text_config"])
        self.vision = vision_config(self.config, self.manifest["vision_config"])

    def load(self, model: nn.Module) -> nn.Module:
        """The model with the reference's weights, strictly; of tensors that are tied we keep the first alone."""
        load_strictly(model.eval(), converted(self.state, model), self.folder)
        assert sum(p.numel() for p in model.parameters()) == self.manifest["num_params"]
        for first, second in self.manifest["tied_keys"]:
            assert torch.equal(self.state[first], self.state[second])
        return model

    def xvlm(self, heads: tuple[str, ...] = PRETRAINING_HEADS, looks: int = 1) -> XVLM:
        text = self.text.model_copy(update={"looks": looks})
        config = XVLMConfig(vision=self.vision, text=text, embed_dim=self.config["embed_dim"], heads=heads)
        return self.load(XVLM(config))

    def given(self, prefix: str) -> dict[str, torch.Tensor]:
        """Inputs whose names begin so, without the beginning."""
        return {name.removeprefix(prefix): array for name, array in self.inputs.items() if name.startswith(prefix)}

    # Comparisons.

    def close(self, name: str, found: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """An output array, or the rows of it that we compute."""
        expected = self.outputs[name] if where is None else self.outputs[name][where]
        note(self.folder, "arrays", name, found, expected)
        # Half of it for the value: large ones keep fewer digits behind the point.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")

    def loss(self, name: str, found: torch.Tensor) -> None:
        note(self.folder, "losses", name, found, self.outputs[name])
        torch.testing.assert_close(found.detach(), self.outputs[name], atol=1e-5, rtol=0)

    def same(self, name: str, found: torch.Tensor) -> None:
        """Token for token, number for number."""
        note(self.folder, "arrays", name, found, self.outputs[name])
        assert torch.equal(found, self.outputs[name]), name

    def gradients(self, model: nn.Module, prefix: str = "") -> None:
        """The gradient of every parameter against the norm and the weighted sum that the reference stored."""
        found, expected = gradients(self.state, model), self.manifest[f"{prefix}grads"]
        assert found.keys() == expected.keys()
        tied = {second for _, second in self.manifest["tied_keys"]}
        untouched = self.state.keys() - found.keys() - set(self.manifest["buffers"]) - tied
        assert untouched == set(self.manifest[f"{prefix}grads_none"])
        for name, gradient in found.items():
            norm = expected[name]["norm"]
            if norm < 1e-6:  # the true gradient is zero (biases of attention keys), what is left is rounding
                assert gradient.norm() < 1e-5, name
                continue
            of_norm = abs(gradient.norm().item() - norm) / norm
            DIFFERENCES[self.folder]["gradients"][prefix + name] = of_norm
            assert of_norm < 1e-3, name
            # A norm says nothing of direction or order: the reference also stores a fixed weighted sum.
            probe = gradient.double() @ torch.arange(len(gradient), dtype=torch.float64).cos()
            assert probe.item() == pytest.approx(expected[name]["probe"], abs=1e-3 * norm), name


def note(folder: Path, kind: str, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape, name
    DIFFERENCES[folder][kind][name] = (found.detach().double() - expected.double()).abs().max().item()


def converted(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in the official layout as this model of ours takes it."""
    return convert.official(state, model.config.text.text_layers, model.config.text.looks)


def numbered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes, each filled with the number of its name: they tell where each went."""
    return {name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(state.items())}


def gradients(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the reference's names, flat: parts of our tensors, where we keep several of theirs in one."""
    names, origin = list(state), converted(numbered(state), model)
    with_gradient = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    return {
        names[int(i)]: p.grad[origin[name] == i] for name, p in with_gradient for i in origin[name].unique().tolist()
    }


def read(path: Path) -> dict:
    if not path.is_file():
        pytest.skip(f"no reference values in {path}")
    return json.loads(path.read_text())


def arrays(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def whole_images(count: int, size: int) -> Regions:
    """One text about each image."""
    return Regions(
        torch.arange(count),
        torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1),
        torch.tensor([[0.0, 0.0, size, size]]).repeat(count, 1),
        torch.ones(count, dtype=torch.bool),
    )


def swin(size: int) -> VisionConfig:
    """The reference's trunk at 224 or 384 pixels."""
    options = {"window_size": size // 32}
    return VisionConfig(trunk="swin_base_patch4_window7_224", image_size=(size, size), options=options)


def same_names_and_shapes(goldens: Path, name: str, make: Callable[[], nn.Module]) -> None:
    """The real-size state dict of the reference fits a model of ours, tensor for tensor."""
    real = read(goldens / "statedict_real.json")["models"][name]
    with torch.device("meta"):  # shapes without memory
        model = make()
        state = {key: torch.empty(about["shape"]) for key, about in real["keys"].items()}
    load_strictly(model, converted(state, model), name)
    assert sum(p.numel() for p in model.parameters()) == real["num_params"]


def table() -> list[str]:
    """The largest differences of each folder compared so far, in Markdown."""
    heading = "| folder | compared | arrays | losses | gradient norms, relative |"
    lines = [heading, "| --- | --- | --- | --- | --- |"]
    for folder, kinds in sorted(DIFFERENCES.items()):
        where = f"tests/goldens/{folder.name}" if folder.parent == OURS else folder.name
        compared = len(kinds["arrays"] | kinds["losses"])
        cells = [f"`{where}`", f"{compared} of {len(arrays(folder / 'outputs.npz'))}"]
        cells += [f"{max(named.values()):.1e}" if (named := kinds[kind]) else "" for kind in KINDS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
