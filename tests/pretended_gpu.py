"""A GPU that is not there: tensors on "cuda" without contents, for tests of code that needs a GPU.

Shapes, dtypes and devices are computed as on a GPU, so an operation on tensors of two devices or dtypes fails as there.
Copies between host and GPU, and reads of values that would wait for the GPU, are counted. Gradients are empty, because
torch's engine needs a real GPU.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts "waits" for the GPU and copies to it, "to gpu" without waiting and "to gpu, waiting"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts["waits"] += args[0].is_cuda
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten._fused_sgd_.default:  # has no pretended form; the real one requires equal layouts
            for group in zip(*args[:3], strict=True):
                assert len({(value.device, value.dtype, value.shape, value.stride()) for value in group}) == 1
            return None
        result = func(*args, **kwargs)
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if source is not None and args[source].is_cuda != result.is_cuda:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self.counts["waits" if not result.is_cuda else "to gpu" if non_blocking else "to gpu, waiting"] += 1
        return result


@contextlib.contextmanager
def pretended(monkeypatch, *modules: nn.Module) -> Iterator[Traffic]:
    """Move the modules to the GPU that is not there, and count the traffic of the block."""
    traffic = Traffic()
    # torch starts its engine at the first gradient. It must not find the GPU that is not there: with a thread for it,
    # the process could not fork training workers any more.
    torch.zeros(1, requires_grad=True).sum().backward()

    def backward(loss: Tensor) -> None:
        assert loss.is_cuda and loss.dim() == 0 and loss.requires_grad
        for parameter in (value for module in modules for value in module.parameters()):
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def tolist(values: Tensor) -> list[float]:
        traffic.counts["waits"] += values.is_cuda
        return [1.0] * len(values)

    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: values)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            move(module)
        with traffic:
            yield traffic


def move(module: nn.Module) -> None:
    """Replace all parameters and buffers by empty ones on the GPU, inside `pretended`."""
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for name, value in values.items():
                if value is not None:
                    moved = on_gpu(value)
                    values[name] = (
                        nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
                    )


def on_gpu(value: Tensor) -> Tensor:
    """Return an empty tensor on the GPU of the same shape, strides and dtype, inside `pretended`."""
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
