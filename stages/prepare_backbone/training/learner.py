"""Steps of training that keep a GPU busy and resume exactly: the part that the autoencoder and the denoiser share.

AdamW with linear warm-up and then half a cosine down to zero; gradients clipped to norm 1. The result is an exponential
moving average of the weights, whose decay rises to its final value (as in TensorFlow: min(d, (1 + t) / (10 + t))).

On a GPU, products are computed in bfloat16 (autocast). Models this small finish a kernel sooner than Python can launch
the next one, so a step is recorded once as a CUDA graph and then replayed. Nothing waits for the GPU: the loss is
summed there and read every `READ_EVERY` steps.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pipeline import seeding
from pipeline.errors import PipelineError, TrainingDiverged

log = logging.getLogger(__name__)

READ_EVERY = 100
"""Steps between two looks at the loss, at which checkpoints can be written, too."""

_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 0.01
_LARGEST_NORM = 1.0
_WARM_UP_SHARE, _LONGEST_WARM_UP = 0.05, 500  # of the steps
_STEPS_BEFORE_GRAPH = 3  # in which libraries choose their algorithms and allocate their workspaces


class Learner:
    """Modules in training.

    Attributes:
        step: Number of steps done.
        steps: Number of steps to do.
    """

    def __init__(
        self,
        name: str,
        modules: nn.ModuleList,
        loss: Callable[[Generator], Tensor],
        steps: int,
        learning_rate: float,
        ema_decay: float,
        seed: int,
        graph: bool,
    ) -> None:
        """Start at step 0 with the modules' weights.

        `name` is that of the section's learning rate and steps, for errors. `loss` draws a batch by a generator on the
        modules' device and returns its mean loss. `graph` allows a CUDA graph: the loss then depends on nothing on the
        host.
        """
        self.name, self.step, self.steps = name, 0, steps
        self._modules, self._loss, self._ema_decay = modules, loss, ema_decay
        self._weights = [weight for weight in modules.parameters() if weight.requires_grad]
        self._average = [weight.detach().clone() for weight in self._weights]
        self._device = self._weights[0].device
        self._on_gpu = self._device.type == "cuda"
        self._largest_rate = learning_rate
        self._optimizer = torch.optim.AdamW(
            self._weights,
            # A rate on the GPU can change between two replays of a graph.
            lr=torch.tensor(learning_rate, device=self._device) if self._on_gpu else learning_rate,
            betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=self._device.type in ("cuda", "cpu"),
            capturable=self._on_gpu,
        )  # fmt: skip
        self._generator = torch.Generator(self._device).manual_seed(seeding.derive(seed, "guide", name))
        self._loss_sum = torch.zeros((), device=self._device)
        self._steps_in_sum = 0
        self._steps_here = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        # A graph is recorded on a stream of its own, on which the steps before it must have run, too.
        self._side_stream = torch.cuda.Stream(self._device) if graph and self._on_gpu else None

    def advance(self) -> None:
        """Do one step; on a GPU, return before it is done."""
        rate = self._largest_rate * _schedule(self.step, self.steps)
        group = self._optimizer.param_groups[0]
        if self._on_gpu:
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if self._side_stream and self._graph is None and self._steps_here >= _STEPS_BEFORE_GRAPH:
            self._record(self._side_stream)
        if self._graph is not None:
            self._graph.replay()
        elif self._side_stream:
            self._compute_on(self._side_stream)
        else:
            self._compute()
        self.step += 1
        self._steps_here += 1
        self._steps_in_sum += 1
        decay = min(self._ema_decay, self.step / (9 + self.step))
        torch._foreach_lerp_(self._average, [weight.detach() for weight in self._weights], 1 - decay)

    def mean_loss(self) -> float:
        """Return the mean loss since the last call, having waited for the GPU; TrainingDiverged if it is not finite."""
        mean = self._loss_sum.item() / max(1, self._steps_in_sum)
        self._loss_sum.zero_()
        self._steps_in_sum = 0
        if not math.isfinite(mean):
            raise TrainingDiverged(
                f"The {self.name}'s training diverged (its loss before step {self.step} is {mean}). Lower "
                f"prepare_backbone.training.{self.name}_learning_rate (it is {self._largest_rate:g})."
            )
        return mean

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the average in place of the modules' weights inside the block, which is how they are evaluated."""
        own = [weight.detach().clone() for weight in self._weights]
        self._set_weights(self._average)
        training = self._modules.training
        self._modules.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._set_weights(own)
            self._modules.train(training)

    def finish(self) -> None:
        """Leave the average in the modules, frozen."""
        self._set_weights(self._average)
        self._modules.eval().requires_grad_(False)
        self._graph = None  # frees its memory

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next steps depend on: tensors, and JSON values."""
        tensors = {"generator": self._generator.get_state(), "loss_sum": self._loss_sum}
        moments = self._optimizer.state
        for number, (weight, average) in enumerate(zip(self._weights, self._average, strict=True)):
            tensors |= {f"weight/{number}": weight, f"average/{number}": average}
            tensors |= {f"{key}/{number}": value for key, value in moments[weight].items()}
        return tensors, {"step": self.step, "steps_in_sum": self._steps_in_sum}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Continue from a state, before the first step."""
        self._generator.set_state(tensors["generator"].cpu())
        self._loss_sum.copy_(tensors["loss_sum"])
        self.step, self._steps_in_sum = meta["step"], meta["steps_in_sum"]
        with torch.no_grad():
            for number, weight in enumerate(self._weights):
                weight.copy_(tensors[f"weight/{number}"])
                self._average[number].copy_(tensors[f"average/{number}"])
                # The fused kernel needs moments in the layout of their weight.
                moments = {
                    key: torch.zeros_like(weight).copy_(tensors[f"{key}/{number}"]) for key in ("exp_avg", "exp_avg_sq")
                }
                self._optimizer.state[weight] = {"step": tensors[f"step/{number}"].to(self._device), **moments}

    def _compute(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._on_gpu):
            loss = self._loss(self._generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, _LARGEST_NORM)
        self._optimizer.step()
        self._loss_sum += loss.detach()

    def _compute_on(self, stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._compute()
        current.wait_stream(stream)

    def _record(self, stream: torch.cuda.Stream) -> None:
        """Record a step as a CUDA graph, without doing it; if it cannot be recorded, steps are launched as before."""
        state = self._generator.get_state()
        try:
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            self._optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, stream=stream):
                self._compute()
            self._graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            log.warning(
                "steps of the %s are launched one by one, which is slower (no CUDA graph: %s)", self.name, reason
            )
            self._side_stream = None
            self._generator = torch.Generator(self._device)  # one that took part in a failed recording is unusable
            self._generator.set_state(state)

    @torch.no_grad()
    def _set_weights(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate in a step, counted from 0: up to 1, then half a cosine towards 0."""
    warm_up = max(1, min(_LONGEST_WARM_UP, round(_WARM_UP_SHARE * steps)))
    rising = min(1.0, (step + 1) / warm_up)
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def out_of_memory(error: BaseException, batch_size: int) -> PipelineError | None:
    """Return the error to raise if `error` says that a step does not fit into memory."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    remedy = f"Set it to {batch_size // 2}, or choose" if batch_size > 1 else "Choose"
    return PipelineError(
        f"A step does not fit into memory (prepare_backbone.training.batch_size is {batch_size}). {remedy} a smaller "
        "size or image_size."
    )
