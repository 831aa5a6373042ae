"""The loop: continuing a run repeats the uninterrupted one to the bit; bad states and bad losses are loud."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

from xvlm import engine, runlog, states, train
from xvlm.config import ConfigError, Configured
from xvlm.models.depth import layers_above
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
    assert states.states(tmp_path / "cut")[0].name == "00000002"
    continued = run(tmp_path / "cut", recipe=recipe, accumulate=accumulate)
    assert straight.keys() == continued.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, continued[name]), name
    timing = {"seconds", "images_per_s", "texts_per_s", "waiting_for_data", "memory_gb", "continued_from"}
    logs = [
        [{k: v for k, v in line.items() if k not in timing} for line in runlog.read_log(tmp_path / name)]
        for name in ("straight", "cut")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_checkpointed_and_compiled_runs_are_what_the_configuration_says(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(engine.economy, "compile_layers", compiled.append)
    plain = run(tmp_path / "plain", steps=3)
    assert compiled == []
    economical = run(tmp_path / "economical", steps=3, gradient_checkpointing=True, compile=True)
    assert len(compiled) == 1
    torch.testing.assert_close(economical, plain, atol=1e-6, rtol=1e-5)


def saved(out, step: int) -> dict:
    return torch.load(out / f"state/{step:08d}/state.pt", weights_only=True)


def test_the_average_is_what_a_run_ends_with(tmp_path):
    plain = run(tmp_path / "plain", save_every=1, keep=9)
    averaged = run(tmp_path / "averaged", ema=0.5)
    expected = tiny.model().state_dict()
    for step in range(1, 7):
        weights = saved(tmp_path / "plain", step)["task"]
        kept = min(0.5, (1 + step) / (10 + step))
        expected = {name: kept * tensor + (1 - kept) * weights[f"model.{name}"] for name, tensor in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[f"model.{name}"], tensor, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged["model.temperature"], plain["model.temperature"])
    trained = saved(tmp_path / "averaged", 6)["task"]
    assert all(torch.equal(trained[name], tensor) for name, tensor in plain.items())


def test_a_continued_average_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    straight = run(tmp_path / "run", ema=0.9, keep=9)
    for step in (6, 4):
        shutil.rmtree(tmp_path / f"run/state/{step:08d}")
    continued = run(tmp_path / "run", ema=0.9, keep=9)
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())
    again = run(tmp_path / "run", ema=0.9, keep=9)  # nothing left to do: the average all the same
    assert all(torch.equal(tensor, again[name]) for name, tensor in straight.items())


def test_the_loss_scale_is_part_of_a_state(tmp_path, monkeypatch):
    """Half precision needs a GPU; its scaler alone does not."""
    make = train.make_accelerator

    def scaling(config, out):
        accelerator = make(config, out)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", scaling)
    straight = run(tmp_path / "run", keep=9)
    scales = [line["loss_scale"] for line in runlog.read_log(tmp_path / "run")]
    assert scales[0] < scales[2] < scales[-1]
    for step in (6, 4):
        shutil.rmtree(tmp_path / f"run/state/{step:08d}")
    continued = run(tmp_path / "run", keep=9)
    assert [line["loss_scale"] for line in runlog.read_log(tmp_path / "run")] == scales
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())


def validated(out, numbers: list[float], **changes) -> tuple[list[tuple[str, float]], Task]:
    """Train with a measure that gives these numbers: what was kept as the best, with its temperature, and the task."""
    given, kept = iter(numbers), []
    task = Task(PretrainingConfig(), tiny.model())
    config = train.TrainConfig(**{"steps": 6, "save_every": 2, "validate_every": 2, "best": "slice/acc", **changes})
    out.mkdir(exist_ok=True)
    validation = runlog.Validation(
        lambda: {"slice/acc": next(given)}, lambda folder: kept.append((folder.name, task.model.temperature.item()))
    )
    accelerator = train.make_accelerator(config, out)
    train.fit(task, STREAMS, config, OPTIM, out, accelerator, validation=validation)
    return kept, task


def test_validation_keeps_the_best_and_leaves_training_alone(tmp_path):
    kept, task = validated(tmp_path / "run", [0.5, 0.4, 0.7])
    assert [folder for folder, _ in kept] == ["best", "best"]
    assert kept[1][1] == task.model.temperature.item() != kept[0][1]
    lines = runlog.read_log(tmp_path / "run", "validation.jsonl")
    assert [(line["step"], line["slice/acc"]) for line in lines] == [(2, 0.5), (4, 0.4), (6, 0.7)]
    _, other = validated(tmp_path / "less", [0.1], validate_every=6)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))


def test_what_was_best_before_a_run_was_continued_counts(tmp_path):
    validated(tmp_path / "run", [0.5, 0.9, 0.7], keep=9)
    for step in (6, 4):
        shutil.rmtree(tmp_path / f"run/state/{step:08d}")
    kept, _ = validated(tmp_path / "run", [0.4, 0.6], keep=9)
    assert len(kept) == 1
    lines = runlog.read_log(tmp_path / "run", "validation.jsonl")
    assert [(line["step"], line["slice/acc"]) for line in lines] == [(2, 0.5), (4, 0.4), (6, 0.6)]


def test_an_average_is_what_validation_sees(tmp_path):
    kept, task = validated(tmp_path / "run", [0.5, 0.6, 0.7], ema=0.5)
    assert kept[-1][1] == task.model.temperature.item()


def test_a_number_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.best: 'slice/precision' is not measured; there are slice/acc"):
        validated(tmp_path / "run", [0.5], best="slice/precision")
    with pytest.raises(ValueError, match="best needs validate_every"):
        train.TrainConfig(best="slice/acc")


def test_a_window_of_steps_is_traced(tmp_path):
    run(tmp_path / "run", steps=4, profile=(1, 3))
    (trace,) = (tmp_path / "run/trace").iterdir()
    assert trace.name == "steps-1-3-process-0.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"aten::addmm", "ProfilerStep#1", "ProfilerStep#2"}
    assert not {event["name"] for event in events} & {"ProfilerStep#0", "ProfilerStep#3"}
    with pytest.raises(ValueError, match="expected steps in order, from 0 to 4"):
        train.TrainConfig(steps=4, profile=(3, 9))


def test_trackers_get_what_the_log_says(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install -e '.[track]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", trackers=["tensorboard"], steps=3)
    events = EventAccumulator(str(tmp_path / "run/run"))
    events.Reload()
    found = [event.value for event in events.Scalars("caption/itc")]
    assert found == pytest.approx([line["caption/itc"] for line in runlog.read_log(tmp_path / "run")])


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"train\.trackers: tensorboard is not installed \(pip install -e '\.\[track"):
        train.make_accelerator(train.TrainConfig(trackers=["tensorboard"]), tmp_path)


def test_a_signal_saves_and_leaves(tmp_path):
    def interrupted(start):
        for n, batch in enumerate(STREAMS["caption"](start)):
            if n == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(train.Interrupted, match="stopped at step 3 of 6"):
        run(tmp_path / "run", streams={"caption": interrupted})
    assert states.states(tmp_path / "run")[0].name == "00000003"


def test_a_continued_run_says_where_it_goes_on(tmp_path, capsys):
    run(tmp_path / "run", steps=2)
    assert "continuing" not in capsys.readouterr().out
    run(tmp_path / "run", steps=4)
    line = f"continuing from step 2 of 4 (checkpoint {tmp_path}/run/state/00000002)"
    assert capsys.readouterr().out.splitlines() == [line]
    told = [(each["step"], each.get("continued_from")) for each in runlog.read_log(tmp_path / "run")]
    assert told == [(1, None), (2, None), (3, 2), (4, None)]


def test_only_the_newest_states_are_kept_and_unfinished_ones_do_not_count(tmp_path):
    run(tmp_path / "run", save_every=1, keep=2)
    folder = tmp_path / "run/state"
    assert sorted(p.name for p in folder.iterdir()) == ["00000005", "00000006"]
    (folder / ".unfinished").mkdir()
    assert states.states(tmp_path / "run")[0].name == "00000006"


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


@pytest.mark.parametrize("frozen", [["model.vision"], ["model.vision.trunk.layer1"]])
def test_statistics_of_layers_that_do_not_learn_stay(tmp_path, frozen):
    vision = VisionConfig(trunk="resnet10t", image_size=(32, 32))
    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"vision": vision})))
    before = {name: buffer.clone() for name, buffer in task.named_buffers() if "running_" in name}
    (tmp_path / "run").mkdir()
    config, optim = train.TrainConfig(steps=2), OPTIM.model_copy(update={"freeze": frozen})
    train.fit(task, STREAMS, config, optim, tmp_path / "run", train.make_accelerator(config, tmp_path / "run"))
    moved = {name for name, buffer in task.named_buffers() if name in before and not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if not name.startswith(tuple(frozen))}


def test_frozen_statistics_are_frozen_from_birth():
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    for freeze in (True, False):
        encoder = VisionEncoder(VisionConfig(trunk="resnet10t", image_size=(32, 32), freeze_statistics=freeze))
        norms = [module for module in encoder.modules() if isinstance(module, batch_norm)]
        assert norms and all(norm.training is not freeze for norm in norms) and encoder.training


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, caplog):
    straight = run(tmp_path / "run", save_every=2)
    newest, before = (state / "state.pt" for state in states.states(tmp_path / "run"))
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

    with pytest.raises(FloatingPointError, match=r"caption/itc.*nan.*process 0's .*'r0', 'r1', 'r2'"):
        run(tmp_path / "run", streams={"caption": poisoned})


def in_group(work, out, rank: int, world: int, port: int) -> None:
    """Work in a process of a group; what it fails of goes to ``out``."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    try:
        work(rank)
    except FloatingPointError as error:
        (out / f"error.{rank}").write_text(str(error))
        os._exit(3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_on_one_process_stops_all_of_them(tmp_path, accumulate):
    def poisoned(rank: int):
        def opened(start):
            for n, batch in enumerate(STREAMS["region"](start)):
                if rank == 1 and n == 3 * accumulate - 1:  # the last turn of the third step
                    batch.regions.boxes_cxcywh[:] = float("nan")
                yield batch

        return opened

    def work(rank: int) -> None:
        run(tmp_path / "run", streams={"region": poisoned(rank)}, accumulate=accumulate)

    (tmp_path / "run").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    group = [fork.Process(target=in_group, args=(work, tmp_path, rank, 2, port)) for rank in (0, 1)]
    for process in group:
        process.start()
    for process in group:
        process.join(100)
    assert [process.exitcode for process in group] == [1, 3]
    said = (tmp_path / "error.1").read_text()
    assert re.search(r"region/box_l1': nan.* on process 1's batches with records {'region': \('r0', 'r1'", said), said
    assert states.states(tmp_path / "run")[0].name == "00000002"


def test_a_gradient_that_is_not_finite_names_the_records(tmp_path, monkeypatch):
    whole = Task.forward

    def forward(task, batches):
        losses = whole(task, batches)
        name, loss = next(iter(losses.items()))
        return losses | {name: loss + 0 * (task.model.temperature - task.model.temperature.detach()).sqrt()}

    monkeypatch.setattr(Task, "forward", forward)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is nan after process 0's batches .*'r0', 'r1'"):
        run(tmp_path / "run", streams={"caption": STREAMS["caption"]})
    assert states.states(tmp_path / "run") == []


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
    train.claim(tmp_path / "run", RunConfig(steps=2))
    train.claim(tmp_path / "run", RunConfig(steps=3))  # nothing was learned yet: a mistake is put right
    (tmp_path / "run" / "log.jsonl").touch()
    train.claim(tmp_path / "run", RunConfig(steps=3))
    with pytest.raises(
        ConfigError, match=r"another configuration \(optim.lr was 0.0001, is now 0.1; steps was 3, is now 4"
    ):
        train.claim(tmp_path / "run", RunConfig(steps=4, optim=OptimConfig(lr=0.1)))


def test_a_run_may_go_on_with_other_workers_and_another_rhythm(tmp_path):
    class Run(Configured):
        train: train.TrainConfig

    def claim(**changes):
        train.claim(tmp_path / "run", Run(train=changes))

    claim(save_every=3)
    (tmp_path / "run" / "log.jsonl").touch()
    claim(save_every=5, keep=7, log_every=2, trackers=["tensorboard"])
    with pytest.raises(ConfigError, match=r"\(train.seed was 0, is now 1\)"):
        claim(save_every=5, seed=1)


def test_a_log_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert runlog.read_log(tmp_path) == [{"step": 1}]


def by_rule(groups: list[dict]) -> dict[tuple[float, float], list[str]]:
    """Names by weight decay and factor of the rate."""
    found = {}
    for group in groups:
        found.setdefault((group["weight_decay"], group["lr_scale"]), []).extend(group["names"])
    return found


def test_parameter_groups():
    model = tiny.model()
    config = OptimConfig(freeze=["vision."], new_layers_lr=3.0, weight_decay=0.5)
    groups = parameter_groups(model, config, fresh=["box_head.0.weight", "box_head.0.bias"])
    found = by_rule(groups)
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


def test_rates_fall_from_the_top_layer_down():
    model = tiny.model()  # a trunk of 2 blocks, 2 text layers, 2 cross layers
    above = layers_above(model)
    config = OptimConfig(layer_decay=0.5)
    rates = {name: g["lr_scale"] for g in parameter_groups(model, config, above=above) for name in g["names"]}
    assert rates["cross.layers.1.norm.weight"] == 1.0 and rates["cross.layers.0.norm.weight"] == 0.5
    assert rates["text.layers.1.norm.weight"] == 0.25 and rates["text.layers.0.norm.weight"] == 0.125
    assert rates["text.words.weight"] == rates["text.norm.bias"] == 0.0625
    assert rates["itm_head.0.weight"] == rates["temperature"] == rates["word_head.dense.weight"] == 1.0
    blocks = [rates[f"vision.trunk.layers.{stage}.blocks.0.norm1.weight"] for stage in (0, 1)]
    assert blocks == [0.5, 1.0] and rates["vision.trunk.patch_embed.proj.weight"] == 0.25
    assert rates["vision.trunk.norm.weight"] == 1.0
    assert set(rates) == {name for name, _ in model.named_parameters()}


def test_position_bias_tables_do_not_decay():
    table = torch.zeros(3, 2)
    assert decays("text.words.weight", table)
    assert not decays("vision.trunk.layers.0.attn.relative_position_bias_table", table)


def test_schedules():
    linear = OptimConfig(warmup=0.1)
    assert [round(lr_factor(s, 20, linear), 3) for s in (0, 1, 2, 11, 20)] == [0, 0.5, 1, 0.5, 0]
    cosine = OptimConfig(warmup=0, schedule="cosine")
    assert [round(lr_factor(s, 20, cosine), 3) for s in (0, 10, 20)] == [1, 0.5, 0]
