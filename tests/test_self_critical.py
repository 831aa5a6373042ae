"""Self-critical captioning: rewards by hand, the gradient by another path, and the same on any number of processes."""

import os
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xvlm import train
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.metrics import captions as metrics
from xvlm.models.decoder import Captioner, CaptionerConfig, next_words
from xvlm.optim import OptimConfig, make_optimizer
from xvlm.tasks.captioning import CaptioningConfig, Reward, Task, prepare
from xvlm.types import Batch, Regions

KNOWN = [["a red disc", "one red disc"], ["a blue star", "the star is blue"], ["two squares", "squares"], ["a cross"]]
STEADY = tiny.VISION.model_copy(update={"options": tiny.SWIN | {"drop_path_rate": 0.0}})
OPTIM = OptimConfig(lr=1e-2, clip=1e9, eps=1e-3)


def processor() -> Processor:
    return Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=32, end_token=True))


def a_task(baseline: str, samples: int = 3) -> Task:
    words = processor()
    config = {"prompt": "", "prompt_tokens": 1}
    config["self_critical"] = {"samples": samples, "baseline": baseline, "max_tokens": 6}
    torch.manual_seed(0)
    text = tiny.TEXT.model_copy(update={"vocab_size": words.vocab_size})
    model = Captioner(CaptionerConfig(vision=STEADY, text=text))
    # A model that says words of the captions often enough for its rewards to differ.
    some = {token for several in KNOWN for text in several for token in words.encode(text)[0]}
    with torch.no_grad():
        model.decoder.word_head.bias[list(some)] += 8
    task = Task(CaptioningConfig.model_validate(config), model)
    task.reward = Reward(words, "", KNOWN)
    return task.train()


def batch(images: range = range(4)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(KNOWN), 3, 32, 32, generator=generator)[images.start : images.stop]
    several = [(i, text) for i, place in enumerate(images) for text in KNOWN[place]]
    regions = Regions.whole_images(torch.tensor([i for i, _ in several]), (32, 32))
    texts = processor().texts([text for _, text in several])
    return Batch(pixels, texts, regions, places=torch.arange(images.start, images.stop))


def test_a_reward_is_cider_d_by_the_documents_of_training_with_the_end_as_a_word():
    reward = Reward(processor(), "", KNOWN)
    assert reward.documents.images == 4
    assert reward.documents.counts[("red",)] == 1 and reward.documents.counts[("a",)] == 3
    assert reward.documents.counts[("disc", "[SEP]")] == 1 and reward.documents.counts[("[SEP]",)] == 4
    written = processor().texts(["a red disc", "a blue star"])
    words = [["a", "red", "disc", "[SEP]"], ["a", "blue", "star", "[SEP]"]]
    assert reward.each(written) == words
    cut = replace(written, mask=written.mask & (torch.arange(written.ids.shape[1]) < 4))
    assert reward.each(cut) == [each[:-1] for each in words]
    known = [[["a", "red", "disc", "[SEP]"]], [["a", "red", "disc", "[SEP]"]]]
    same, other = reward(written, known).tolist()
    assert same == pytest.approx(10.0) and 0 < other < 1
    assert reward(cut, known)[0] < same


def test_what_java_needs_is_known_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    task = a_task("greedy")
    task.config = task.config.model_copy(update={"java": True})
    with pytest.raises(
        ModuleNotFoundError, match=r"METEOR and SPICE need pycocoevalcap: pip install -e '\.\[captions\]'"
    ):
        prepare(task, processor(), [])


def test_documents_of_others_weigh_the_words():
    said, known = [["a", "dog"]], [[["a", "dog"]]]
    assert metrics.cider_d(said, known) == [0.0]  # the only document
    documents = metrics.Documents.of([[["a", "cat"]], [["a", "dog"]], [["a"]]])
    assert documents.images == 3 and documents.counts[("a",)] == 3
    assert metrics.cider_d(said, known, documents=documents) == pytest.approx([5.0])  # of four lengths, two are there


@pytest.mark.parametrize("baseline", ["greedy", "samples"])
def test_the_gradient_is_that_of_the_log_probability_times_the_gain(baseline, monkeypatch):
    """Against the decoder's own pass over the texts that were drawn."""
    task, drawn = a_task(baseline), []
    scored = Reward.__call__

    def listen(self, written, known):
        drawn.append((written, scored(self, written, known)))
        return drawn[-1][1]

    monkeypatch.setattr(Reward, "__call__", listen)
    task.zero_grad()
    told = task({"train": batch()})
    loss = told["train/self_critical"]
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
    texts, rewards = drawn[0]
    assert len(rewards) == 12 and rewards.std() > 0
    assert told["train/reward"] == rewards.mean() and not told["train/reward"].requires_grad
    if baseline == "greedy":
        gain = rewards.view(4, 3) - drawn[1][1][:, None]
    else:
        gain = rewards.view(4, 3) - torch.stack(
            [rewards.view(4, 3)[:, [j for j in range(3) if j != i]].mean(1) for i in range(3)], 1
        )
    task.zero_grad()
    concepts = task.model.vision(batch().images)
    only, words = next_words(texts)
    logits = task.model.decoder(texts, concepts, torch.arange(4).repeat_interleave(3), only=only)
    log_p = logits.log_softmax(-1).gather(1, words[:, None])[:, 0]
    text = only.nonzero()[:, 0]
    mean = torch.zeros(12).index_add(0, text, log_p) / only.sum(1)
    expected = -(gain.flatten() * mean).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_drawn_scores_better_with_training():
    task = a_task("samples", samples=6)
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    means = []
    reward = task.reward

    def listen(written, known):
        found = reward(written, known)
        means.append(found.mean().item())
        return found

    listen.end, listen.each = reward.end, reward.each
    task.reward = listen
    for step in range(60):
        loss = task({"train": replace(batch(), places=torch.arange(4) + 4 * step)})["train/self_critical"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(means[-10:]) > 1.2 * sum(means[:10])


CASES = list(product(("greedy", "samples"), (1, 2)))


def update(baseline: str, turns: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of one update, as the training loop makes it, of this process's share of the images."""
    task = a_task(baseline)
    mine = len(KNOWN) // world // turns
    parts = [batch(range(first, first + mine)) for first in range(rank * turns * mine, (rank + 1) * turns * mine, mine)]
    accelerator = train.make_accelerator(train.TrainConfig(accumulate=turns), Path())
    optimizer = make_optimizer(task, OPTIM)
    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None})
    )
    model, prepared = accelerator.prepare(task, optimizer)
    seed = partial(train.seed_step, 0, 0)
    loss = train._update(model, [{"train": part} for part in parts], prepared, OPTIM, accelerator, seed)
    total = loss["train/self_critical"].clone()
    if world > 1:
        dist.all_reduce(total)
    return gradients | {"loss": total / world}


def spread(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {case: update(*case, rank, world) for case in CASES}
    if rank == 0:
        torch.save(found, f"{folder}/{world}.pt")
    dist.destroy_process_group()


def test_updates_do_not_depend_on_processes_and_turns(tmp_path):
    mp.spawn(spread, args=(2, str(tmp_path)), nprocs=2)
    spreads = {2: torch.load(tmp_path / "2.pt"), 1: {case: update(*case, 0, 1) for case in CASES}}
    for (baseline, turns), world in product(CASES, spreads):
        expected, got = spreads[1][baseline, 1], spreads[world][baseline, turns]
        assert expected["loss"].abs() > 1e-2 and got.keys() == expected.keys()
        for name, tensor in expected.items():
            off, size = float((got[name] - tensor).norm()), float(tensor.norm())
            if name.endswith("key.bias"):  # what all keys share changes no attention: rounding is all there is
                assert max(off, size) < 1e-8, (baseline, turns, world, name, off, size)
            else:
                assert off <= 1e-5 * size, (baseline, turns, world, name, off, size)
