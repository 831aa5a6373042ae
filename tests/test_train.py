"""The loop: continuing a run repeats the uninterrupted one to the bit; bad states and bad losses are loud."""

import json
import os
import signal

import pytest
import tiny
import torch

from xvlm import train
from xvlm.config import ConfigError, Configured
from xvlm.models.vision import VisionConfig, VisionEncoder
from xvlm.optim import OptimConfig, decays, lr_factor, make_optimizer, parameter_groups
from xvlm.tasks.pretraining import PretrainingConfig, Task


def stream(seed: int, whole: bool):
    def opened(start: int):
        n = start
        while True:
            yield tiny.batch(seed=seed * 1000 + n, whole=whole)
            n += 1

    return opened


STREAMS = {"caption": stream(1, True), "region": stream(2, False)}
OPTIM = OptimConfig(lr=1e-2, warmup=2)


def run(out, steps=6, streams=STREAMS, accumulate=1, **changes):
    """A task with dropout, trained in ``out``; returns its weights."""
    config = train.TrainConfig(**{"steps": steps, "save_every": 2, "log_every": 1, "accumulate": accumulate, **changes})
    streams = {name: lambda start, opened=opened: opened(start * accumulate) for name, opened in streams.items()}
    text = tiny.TEXT.model_copy(update={"dropout": 0.1})
    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"text": text})).train())
    out.mkdir(exist_ok=True)
    train.fit(task, streams, config, OPTIM, out, train.make_accelerator(config, out))
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


@pytest.mark.parametrize(("recipe", "accumulate"), [("alternate", 1), ("joint", 1), ("alternate", 2)])
def test_a_continued_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, recipe, accumulate):
    straight = run(tmp_path / "straight", recipe=recipe, accumulate=accumulate)

    def dies(opened, after):
        def until(start):
            for n, batch in enumerate(opened(start)):
                if n == after * accumulate:
                    raise KeyError("power cut")
                yield batch

        return until

    with pytest.raises(KeyError):
        cut = STREAMS | {"caption": dies(STREAMS["caption"], 3)}
        run(tmp_path / "cut", recipe=recipe, accumulate=accumulate, streams=cut)
    assert train.states(tmp_path / "cut")[0].name == "00000002"
    continued = run(tmp_path / "cut", recipe=recipe, accumulate=accumulate)
    assert straight.keys() == continued.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, continued[name]), name
    timing = {"seconds", "images_per_s", "texts_per_s", "waiting_for_data"}
    logs = [
        [{k: v for k, v in line.items() if k not in timing} for line in train.read_log(tmp_path / name)]
        for name in ("straight", "cut")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_checkpointed_and_compiled_runs_are_what_the_configuration_says(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(train.economy, "compile_layers", compiled.append)
    plain = run(tmp_path / "plain", steps=3)
    assert compiled == []
    economical = run(tmp_path / "economical", steps=3, gradient_checkpointing=True, compile=True)
    assert len(compiled) == 1
    torch.testing.assert_close(economical, plain, atol=1e-6, rtol=1e-5)


def test_a_signal_saves_and_leaves(tmp_path):
    def interrupted(start):
        for n, batch in enumerate(STREAMS["caption"](start)):
            if n == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(train.Interrupted, match="stopped at step 3 of 6"):
        run(tmp_path / "run", streams={"caption": interrupted})
    assert train.states(tmp_path / "run")[0].name == "00000003"


def test_only_the_newest_states_are_kept_and_unfinished_ones_do_not_count(tmp_path):
    run(tmp_path / "run", save_every=1, keep=2)
    states = tmp_path / "run/state"
    assert sorted(p.name for p in states.iterdir()) == ["00000005", "00000006"]
    (states / ".unfinished").mkdir()
    assert train.states(tmp_path / "run")[0].name == "00000006"


def test_training_is_in_training_mode_and_statistics_stay_where_they_are_frozen(tmp_path):
    """Whatever mode the task came in, and with no evaluation before that would have set it."""
    vision = VisionConfig(trunk="resnet10t", image_size=(32, 32), freeze_statistics=True)
    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"vision": vision})).eval())
    seen = {}
    task.model.text.register_forward_hook(lambda *_: seen.update(text=task.model.text.training))
    before = {name: buffer.clone() for name, buffer in task.named_buffers()}
    (tmp_path / "run").mkdir()
    config = train.TrainConfig(steps=2)
    train.fit(task, STREAMS, config, OPTIM, tmp_path / "run", train.make_accelerator(config, tmp_path / "run"))
    assert seen == {"text": True} and len(before) > 10
    assert all(torch.equal(buffer, before[name]) for name, buffer in task.named_buffers())


def test_frozen_statistics_are_frozen_from_birth():
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    for freeze in (True, False):
        encoder = VisionEncoder(VisionConfig(trunk="resnet10t", image_size=(32, 32), freeze_statistics=freeze))
        norms = [module for module in encoder.modules() if isinstance(module, batch_norm)]
        assert norms and all(norm.training is not freeze for norm in norms) and encoder.training


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, caplog):
    straight = run(tmp_path / "run", save_every=2)
    newest, before = (state / "state.pt" for state in train.states(tmp_path / "run"))
    newest.write_bytes(newest.read_bytes()[:1000])
    continued = run(tmp_path / "run", save_every=2)
    assert f"{newest} cannot be read" in caplog.text
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())
    for state in (newest, before):
        state.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the states can be read"):
        run(tmp_path / "run", save_every=2)


def test_a_loss_that_is_not_finite_names_itself_and_the_records(tmp_path):
    def poisoned(start):
        for batch in STREAMS["caption"](start):
            batch.images[0] = float("nan")
            yield batch

    with pytest.raises(FloatingPointError, match=r"caption/itc.*nan.*'r0', 'r1', 'r2'"):
        run(tmp_path / "run", streams={"caption": poisoned})


def test_one_batch_can_be_learned_by_heart(tmp_path):
    batch = tiny.batch(images=2, per_image=2)
    task = Task(PretrainingConfig(), tiny.model().train())
    optimizer = make_optimizer(task, OptimConfig(lr=5e-3))
    first = None
    for step in range(150):
        train.seed_step(0, step)
        train.set_lr(optimizer, 5e-3)
        losses = task({"region": batch})
        first = first or {name: float(loss.detach()) for name, loss in losses.items()}
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, loss in losses.items():
        assert float(loss.detach()) < 0.35 * first[name], name


def test_alternating_recipe_takes_region_updates_with_the_given_probability():
    config = train.TrainConfig(region_probability=0.3)
    drawn = [train.updates(config, step, ["caption", "region"]) for step in range(2000)]
    assert all(update[-1] == ["caption"] for update in drawn)
    assert sum(len(update) == 2 for update in drawn) / 2000 == pytest.approx(0.3, abs=0.04)
    joint = train.TrainConfig(recipe="joint")
    assert train.updates(joint, 0, ["caption", "region"]) == [["caption", "region"]]


class RunConfig(Configured):
    steps: int
    optim: OptimConfig = OptimConfig()


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    train.claim(tmp_path / "run", RunConfig(steps=3))
    train.claim(tmp_path / "run", RunConfig(steps=3))
    with pytest.raises(
        ConfigError, match=r"another configuration \(optim.lr was 0.0001, is now 0.1; steps was 3, is now 4"
    ):
        train.claim(tmp_path / "run", RunConfig(steps=4, optim=OptimConfig(lr=0.1)))


def test_a_log_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert train.read_log(tmp_path) == [{"step": 1}]


def test_parameter_groups():
    model = tiny.model()
    config = OptimConfig(freeze=["vision."], new_layers_lr=3.0, weight_decay=0.5)
    groups = parameter_groups(model, config, fresh=["box_head.0.weight", "box_head.0.bias"])
    found = {(g["weight_decay"], g["lr_scale"]): g["names"] for g in groups}
    assert found[0.5, 3.0] == ["box_head.0.weight"] and found[0.0, 3.0] == ["box_head.0.bias"]
    assert not any(name.startswith("vision.") for names in found.values() for name in names)
    assert not model.vision.trunk.patch_embed.proj.weight.requires_grad
    assert "temperature" in found[0.0, 1.0] and "text.words.weight" in found[0.5, 1.0]
    scaled = OptimConfig(new_layers_lr=3.0, scales={"text.": 0.5, "text.words": 0.25})
    rates = {
        name: group["lr_scale"]
        for group in parameter_groups(model, scaled, fresh=["text.norm.bias"])
        for name in group["names"]
    }
    assert (rates["text.norm.weight"], rates["text.norm.bias"], rates["text.words.weight"]) == (0.5, 1.5, 0.25)
    assert rates["cross.layers.0.norm.bias"] == 1.0
    with pytest.raises(ValueError, match=r"optim\.scales: no parameter begins with 'txet'"):
        parameter_groups(model, OptimConfig(scales={"txet": 1.0}))
    with pytest.raises(ValueError, match="no parameter begins with 'visoin'"):
        parameter_groups(model, OptimConfig(freeze=["visoin"]))
    with pytest.raises(ValueError, match=r"does not have: .'nonesuch'"):
        parameter_groups(model, OptimConfig(), fresh=["nonesuch"])


def test_position_bias_tables_do_not_decay():
    table = torch.zeros(3, 2)
    assert decays("text.words.weight", table)
    assert not decays("vision.trunk.layers.0.attn.relative_position_bias_table", table)


def test_schedules():
    linear = OptimConfig(warmup=0.1)
    assert [round(lr_factor(s, 20, linear), 3) for s in (0, 1, 2, 11, 20)] == [0, 0.5, 1, 0.5, 0]
    cosine = OptimConfig(warmup=0, schedule="cosine")
    assert [round(lr_factor(s, 20, cosine), 3) for s in (0, 10, 20)] == [1, 0.5, 0]
