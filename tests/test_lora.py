"""Low-rank adaptation: nothing changes at first, little learns, and merged weights are a plain model's."""

import contextlib

import pytest
import tiny
import torch

from xvlm import optim, train
from xvlm.models import lora
from xvlm.models.xvlm import XVLM
from xvlm.optim import OptimConfig
from xvlm.runlog import read_log
from xvlm.tasks.pretraining import PretrainingConfig, Task

RANK = lora.LoraConfig(rank=2, alpha=6, layers=("*.query", "*.value", "vision.trunk.*.qkv"))


def adapted(config: lora.LoraConfig = RANK, fresh=()) -> XVLM:
    model = tiny.model()
    lora.adapt(model, config, fresh)
    return model


def answers(model: XVLM) -> torch.Tensor:
    batch = tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    fused = model.fuse(words, concepts, len(batch.images) + torch.arange(len(batch.texts.ids)))
    return torch.cat([model.match(fused), model.locate(fused), model.embed_image(concepts.take(torch.arange(9)))], 1)


def learned(model: XVLM) -> XVLM:
    """With something in its thin matrices."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, lora.LowRank):
            torch.nn.init.normal_(module.up, std=0.3)
    return model


@torch.no_grad()
def test_an_adapted_model_answers_as_before_until_it_learns():
    torch.testing.assert_close(answers(adapted()), answers(tiny.model()), rtol=0, atol=0)
    assert not torch.allclose(answers(learned(adapted())), answers(tiny.model()), atol=1e-2)


def test_an_adapted_layer_by_hand():
    layer = torch.nn.Linear(3, 2)
    thin = lora.LowRank(layer, lora.LoraConfig(rank=1, alpha=4))
    thin.down.data, thin.up.data = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[1.0, 5.0, 1.0]])
    torch.testing.assert_close(thin(x), layer(x) + 4 * torch.tensor([[3.0, -3.0]]))


def test_thin_matrices_and_fresh_parameters_learn_alone():
    model = adapted(fresh=["box_head.0.weight"])
    wanted = {name for name, _ in model.named_parameters() if name.endswith((".up", ".down"))} | {"box_head.0.weight"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in wanted} == {"query", "value", "qkv", "0"}
    groups = optim.parameter_groups(model, OptimConfig())
    assert {name for group in groups for name in group["names"]} == wanted
    learn, everything = optim.learning(model)
    assert learn == sum(parameter.numel() for name, parameter in model.named_parameters() if name in wanted)
    assert everything == sum(parameter.numel() for parameter in model.parameters())


def test_merged_weights_are_a_plain_model_that_answers_the_same(tmp_path):
    model = learned(adapted())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.merged(model).save_pretrained(tmp_path)
    plain = XVLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == tiny.model().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(answers(plain), answers(model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert lora.merged(plain) is plain


def test_patterns_that_fit_nothing_are_named():
    with pytest.raises(ValueError, match=r"no linear layer of the model fits '\*\.q'; there are box_head"):
        adapted(lora.LoraConfig(layers=("*.q",)))
    with pytest.raises(ValueError, match="fresh parameters the model does not have: nowhere"):
        adapted(fresh=["nowhere"])


def test_a_run_that_was_stopped_continues_to_the_bit(tmp_path):
    def run(out, steps) -> dict:
        torch.manual_seed(0)
        task = Task(PretrainingConfig(), adapted(lora.LoraConfig(rank=2, dropout=0.1)))
        config = train.TrainConfig(steps=4, save_every=2, log_every=1)
        accelerator = train.make_accelerator(config, out)
        batches = [tiny.batch(seed=seed) for seed in range(steps)]
        streams = {"region": lambda start: iter(batches[start:])}
        with contextlib.suppress(StopIteration):  # the batches end before the steps: the run stops there
            train.fit(task, streams, config, OptimConfig(lr=1e-2, warmup=0), out, accelerator)
        return task.state_dict()

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "stopped", 3)
    continued = run(tmp_path / "stopped", 4)
    assert all(torch.equal(tensor, continued[name]) for name, tensor in whole.items())
    assert [line["step"] for line in read_log(tmp_path / "stopped")] == [1, 2, 3, 4]
    base = tiny.model().state_dict()
    assert all(torch.equal(tensor, whole[f"model.{name}"]) for name, tensor in base.items())
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if name.endswith(".up"))
