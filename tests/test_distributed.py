"""The same global batch gives the same losses and gradients on one process and on two (gloo)."""

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xvlm import distributed, losses
from xvlm.tasks.pretraining import LossWeights, PretrainingConfig, Task
from xvlm.types import Batch, Masked, Regions, Texts

# Matching draws its negatives among the local pairs, so it depends on how pairs are spread; the others must not.
CONFIG = PretrainingConfig(weights=LossWeights(itm=0.0), targets="known")


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
    return Batch(batch.images[images.start : images.stop], texts, regions, masked)


def gradients(batch: Batch, world: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients as a data-parallel engine leaves them: averaged over processes."""
    task = Task(CONFIG, tiny.model())
    named = task({"region": batch})
    sum(named.values()).backward()
    values = torch.stack([loss.detach() for loss in named.values()])
    grads = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    if world > 1:
        for tensor in (values, *grads.values()):
            dist.all_reduce(tensor)
            tensor /= world
    return dict(zip(named, values.tolist(), strict=True)), grads


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    whole = tiny.batch(images=5)
    mine = part(whole, range(0, 2) if rank == 0 else range(2, 5))  # unequal on purpose
    values, grads = gradients(mine, world)
    assert distributed.gather_objects(rank) == list(range(world))
    if rank == 0:
        torch.save((values, grads), f"{folder}/out.pt")
    dist.destroy_process_group()


def test_losses_and_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    expected_values, expected = gradients(tiny.batch(images=5), 1)
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    values, found = torch.load(tmp_path / "out.pt")
    assert values == pytest.approx(expected_values, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert float(expected["model.temperature"].abs()) > 1e-3


def test_alone_everything_is_local():
    rows = torch.randn(3, 2)
    assert distributed.world() == (0, 1)
    assert distributed.gather(rows) is rows
    assert distributed.gather_objects("x") == ["x"]
    assert float(distributed.share_of_mean(torch.tensor(4.0))) == 0.25
    assert float(losses.matching(torch.zeros(2, 2), torch.tensor([0, 1]))) == pytest.approx(0.6931, abs=1e-4)
