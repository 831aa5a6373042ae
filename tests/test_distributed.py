"""The same global batch gives the same losses, gradients and weights however it is spread over processes and turns."""

import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from xvlm import distributed, losses, train
from xvlm.optim import OptimConfig, make_optimizer
from xvlm.tasks.pretraining import PretrainingConfig, Task
from xvlm.types import Batch, Masked, Regions, Texts


def part(batch: Batch, images: range) -> Batch:
    """The images of a batch in a range, with their texts."""
    rows = [i for i, image in enumerate(batch.regions.image.tolist()) if image in images]
    regions = Regions(
        batch.regions.image[rows] - images.start,
        batch.regions.boxes_cxcywh[rows],
        batch.regions.boxes_xywh[rows],
        batch.regions.whole[rows],
    )
    masked = Masked(batch.masked.ids[rows], batch.masked.hidden[rows])
    texts = Texts(batch.texts.ids[rows], batch.texts.mask[rows])
    places = torch.arange(images.start, images.stop)
    return Batch(batch.images[images.start : images.stop], texts, regions, masked, places=places)


IMAGES = 32
# Which blocks stochastic depth leaves out depends on the process; the text side has no dropout already.
STEADY_VISION = tiny.VISION.model_copy(update={"options": tiny.SWIN | {"drop_path_rate": 0.0}})
STEADY = tiny.CONFIG.model_copy(update={"vision": STEADY_VISION})
OBJECTIVES = {
    "softmax": PretrainingConfig(targets="known", negatives_among=2),
    "sigmoid": PretrainingConfig(targets="known", negatives_among=2, contrast="sigmoid"),
    "diagonal": PretrainingConfig(negatives_among=2),
}
# Adam divides by the size of a gradient; where that is nothing but rounding (the bias of keys), the default eps makes
# an update of it.
OPTIM = OptimConfig(lr=1e-2, clip=1e9, eps=1e-3)


def update(objective: str, grain: str, turns: int, rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Losses, gradients and new weights of one update, as the training loop makes it, of this process's share."""
    whole = tiny.batch(images=IMAGES, per_image=4, whole=grain == "caption")
    texts = range(len(whole.texts.ids))
    # Images have one to four texts each, so that processes and turns have unequal numbers of them.
    kept = [i for i in texts if grain == "caption" or i % 4 <= (i // 4) ** 2 % 5]
    r = whole.regions
    whole = replace(
        whole,
        texts=Texts(whole.texts.ids[kept], whole.texts.mask[kept]),
        masked=Masked(whole.masked.ids[kept], whole.masked.hidden[kept]),
        regions=Regions(r.image[kept], r.boxes_cxcywh[kept], r.boxes_xywh[kept], r.whole[kept]),
    )
    mine = IMAGES // world // turns
    first = rank * turns * mine
    parts = [part(whole, range(first + turn * mine, first + (turn + 1) * mine)) for turn in range(turns)]
    config = train.TrainConfig(accumulate=turns)
    accelerator = train.make_accelerator(config, Path())
    task = Task(OBJECTIVES[objective], tiny.model(STEADY))
    optimizer = make_optimizer(task, OPTIM)
    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None})
    )
    model, prepared = accelerator.prepare(task.train(), optimizer)
    train.set_lr(prepared, OPTIM.lr)
    found = train._update(
        model, [{grain: each} for each in parts], prepared, OPTIM, accelerator, partial(train.seed_step, 0, 0)
    )
    values = torch.stack(list(found.values()))
    if world > 1:
        dist.all_reduce(values)
    return {
        "losses": dict(zip(found, values / world, strict=True)),
        "gradients": gradients,
        "weights": {name: tensor.clone() for name, tensor in task.state_dict().items()},
    }


class ReferenceGather(torch.autograd.Function):
    """X-VLM's gather: back comes what this process's loss says about its own rows, nothing of the others' losses."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_gradients(rank: int, world: int, weight: float) -> dict[str, Tensor]:
    """Gradients of the weighted contrastive loss, averaged over processes as engines do."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 8, 6, generator=generator).chunk(world, 1)[rank]
    parameters = {"tower": torch.eye(6).requires_grad_(), "temperature": torch.tensor(0.5).requires_grad_()}
    features = (normalize(rows @ parameters["tower"], dim=-1) for rows in (image, text))
    (weight * losses.contrastive(*features, parameters["temperature"])).backward()
    for parameter in parameters.values():
        distributed.average_gradient(parameter)
    return {name: parameter.grad for name, parameter in parameters.items()}


CASES = list(product(OBJECTIVES, ("caption", "region"), (1, 2, 4)))


def spread(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {case: update(*case, rank, world) for case in CASES}
    found["weighted"] = contrastive_gradients(rank, world, 1 / world)
    with mock.patch.object(distributed, "gather", ReferenceGather.apply):
        found["reference"] = contrastive_gradients(rank, world, 1.0)
    assert distributed.world() == (rank, world)
    if rank == 0:
        torch.save(found, f"{folder}/{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict]:
    """What processes found, by their number."""
    folder = tmp_path_factory.mktemp("spread")
    for world in (2, 4):
        mp.spawn(spread, args=(world, str(folder)), nprocs=world)
    of_several = {world: torch.load(folder / f"{world}.pt") for world in (2, 4)}
    return {1: {case: update(*case, 0, 1) for case in CASES}} | of_several


def test_updates_do_not_depend_on_processes_and_turns(found):
    largest = 0.0
    for (objective, grain, turns), world in product(CASES, found):
        expected, got = found[1][objective, grain, 1], found[world][objective, grain, turns]
        for kind, tensors in expected.items():
            assert got[kind].keys() == tensors.keys()
            for name, tensor in tensors.items():
                off, size = float((got[kind][name] - tensor).norm()), float(tensor.norm())
                if name.endswith("key.bias"):  # what all keys share changes no attention: rounding is all there is
                    assert max(off, size) < 1e-8, (objective, grain, world, turns, kind, name, off, size)
                    continue
                assert off <= 1e-5 * size, (objective, grain, world, turns, kind, name, off, size)
                largest = max(largest, off / size if size else 0.0)
    print(f"largest relative difference {largest:.1e}")
    assert float(found[1]["softmax", "region", 1]["gradients"]["model.temperature"].abs()) > 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_a_weight_of_one_over_processes_gives_the_gradient_of_the_reference(found, world):
    weighted, reference = found[world]["weighted"], found[world]["reference"]
    assert reference["tower"].norm() > 1e-3 and reference["temperature"].abs() > 1e-3
    torch.testing.assert_close(weighted["tower"], reference["tower"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weighted["temperature"] * world, reference["temperature"], rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow_with_the_number_of_turns():
    """Bytes kept for a backward pass, at the moment when most are."""

    class Kept:
        now = most = 0

        def __init__(self, tensor):
            self.tensor, self.bytes = tensor, tensor.nbytes
            Kept.now += self.bytes
            Kept.most = max(Kept.most, Kept.now)

        def __del__(self):
            Kept.now -= self.bytes

    most = {}
    for turns in (1, 2, 8):
        Kept.now = Kept.most = 0
        accelerator = train.make_accelerator(train.TrainConfig(), Path())
        task = Task(OBJECTIVES["softmax"], tiny.model(STEADY))
        parts = [{"region": part(tiny.batch(images=2), range(2))}] * turns
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            train._update(task, parts, make_optimizer(task, OPTIM), OPTIM, accelerator, partial(train.seed_step, 0, 0))
        most[turns] = Kept.most
    entries = {turns: (6 * turns) ** 2 for turns in most}  # of the similarities of all texts, whoever holds them
    assert most[8] - most[1] < 24 * (entries[8] - entries[1]) and most[2] - most[1] < 24 * (entries[2] - entries[1])


def test_a_second_run_that_exchanges_something_else_is_told():
    turns = distributed.Turns(2)
    for turn in range(2):
        with turns.listen(turn):
            distributed.gather(torch.zeros(3, 2))
    with turns.speak(0), pytest.raises(RuntimeError, match=r"turn 0 exchanged \(3, 2\) before, and \(4, 2\) now"):
        distributed.gather(torch.zeros(4, 2))
    assert distributed.world() == (0, 1)


def test_alone_everything_is_local():
    rows = torch.randn(3, 2)
    assert distributed.world() == (0, 1)
    assert distributed.gather(rows) is rows
    assert distributed.gather_objects("x") == ["x"]
    assert float(distributed.share_of_mean(torch.tensor(4.0))) == 0.25
    assert float(losses.matching(torch.zeros(2, 2), torch.tensor([0, 1]))) == pytest.approx(0.6931, abs=1e-4)
