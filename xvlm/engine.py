"""The task in training under the engine that accelerate was launched with: DDP, FSDP2 or DeepSpeed, or none.

On one process and under DDP the task itself is trained. FSDP2 and DeepSpeed change the module they train (weights in
parts, or in another precision), so they get a copy, and the task takes its weights over whenever it is to be evaluated.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from xvlm import distributed
from xvlm.config import ConfigError
from xvlm.models import economy
from xvlm.models.depth import layers_above
from xvlm.optim import Average, OptimConfig, make_optimizer


class Engine:
    """Weights, optimizer, their average and the loss scale, and how they are saved and continued.

    ``model`` is what is called, ``optimizer`` what is stepped; both as accelerate wrapped them.

    Raises:
        ConfigError: an average of weights under DeepSpeed, which keeps them to itself.
    """

    def __init__(
        self,
        task: nn.Module,
        optim: OptimConfig,
        accelerator: Accelerator,
        *,
        fresh: Sequence[str] = (),
        ema: float | None = None,
        checkpoint: bool = False,
        compile: bool = False,
    ):
        self.task, self.accelerator = task, accelerator
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.deepspeed and ema is not None:
            raise ConfigError("train.ema: DeepSpeed keeps the exact weights to itself; an average needs DDP or FSDP2")
        trained = copy.deepcopy(task) if sharded or self.deepspeed else task
        optimizer = make_optimizer(trained, optim, fresh, layers_above(trained))
        if compile:
            economy.compile_layers(trained)
        if checkpoint:
            economy.checkpoint_layers(trained)
        if sharded:
            _keep_numbers_whole(trained, accelerator)
        if self.deepspeed:
            for number in [p for p in trained.parameters() if p.ndim == 0]:
                number.data = number.data[None]  # it cannot send the temperature otherwise
            # It wants the size of a batch, for a rate that it prints, and clips by itself.
            own = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": optim.clip}
            accelerator.state.deepspeed_plugin.deepspeed_config.update(own)
        self.model, self.optimizer = accelerator.prepare(trained, optimizer)
        self.trained = accelerator.unwrap_model(self.model)
        self.average = None if ema is None else Average(self.trained, ema)

    def state(self) -> dict[str, Any]:
        """What :meth:`load` takes, with whole tensors: also for another engine or number of processes.

        Every process calls it. Under DeepSpeed it is empty, see :meth:`save_own`.
        """
        if self.deepspeed:
            return {}
        scaler, moments = self.accelerator.scaler, self.optimizer.state
        return {
            "task": _whole(self.trained.state_dict()),
            "optimizer": {name: _whole(moments[p]) for name, p in self._learning() if p in moments},
            "average": None if self.average is None else _whole(self.average.values),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        if self.deepspeed:
            return
        own = self.trained.state_dict()
        self.trained.load_state_dict({name: distributed.part_like(t, own[name]) for name, t in state["task"].items()})
        for name, parameter in self._learning():
            if name in state["optimizer"]:
                moments = state["optimizer"][name].items()
                self.optimizer.state[parameter] = {key: _moment(value, parameter) for key, value in moments}
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(distributed.part_like(state["average"][name], value))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def save_own(self, folder: Path) -> None:
        """DeepSpeed's own files, written by every process; nothing under other engines."""
        if self.deepspeed:
            self.model.save_checkpoint(str(folder), tag="deepspeed")

    def load_own(self, folder: Path) -> None:
        if self.deepspeed:
            self.model.load_checkpoint(str(folder), tag="deepspeed")

    def publish(self) -> None:
        """Bring the weights that are evaluated and saved into the task: whole, averaged where there is an average.

        Each process has gathered its own running statistics (BatchNorm); the first one's count.
        """
        if self.average is not None:
            self.average.swap()
        if self.task is not self.trained:
            self.task.load_state_dict(_whole(self.trained.state_dict()))
        distributed.copy_from_main(self.task.buffers())

    @contextmanager
    def published(self) -> Iterator[None]:
        """Publish, and afterwards train on where training was."""
        self.publish()
        yield
        if self.average is not None:
            self.average.swap()

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)


def _keep_numbers_whole(task: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2 cannot divide a single number, the temperature: it leaves it alone, so its gradient is averaged here."""
    numbers = nn.ParameterList(p for p in task.parameters() if p.ndim == 0 and p.requires_grad)
    accelerator.state.fsdp_plugin.ignored_modules = [numbers]
    for number in numbers:
        number.register_post_accumulate_grad_hook(distributed.average_gradient)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: distributed.whole(tensor) for name, tensor in tensors.items()}


def _moment(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of the optimizer's state: shaped like its parameter, or a count."""
    return distributed.part_like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
