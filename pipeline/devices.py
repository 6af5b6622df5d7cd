"""The device to compute on."""

import os
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, device


def resolve(name: str, setting: str = "runtime.device") -> str:
    """Return the torch device of a setting; "auto" is a GPU if there is one, else "cpu".

    A process of accelerate or torchrun uses the GPU of its local rank. Raise ConfigError, which names the setting, if
    there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{setting} = {name} is not a device. Use auto, cpu or cuda.") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"{setting} = {name}: this machine has no usable CUDA GPU. Use auto or cpu.")
    local_rank = os.environ.get("LOCAL_RANK")
    if name.startswith("cuda:"):
        local_rank = name.removeprefix("cuda:")
        if int(local_rank) >= torch.cuda.device_count():
            raise ConfigError(
                f"{setting} = {name}: this machine has {torch.cuda.device_count()} GPUs. Use a lower one."
            )
    elif name != "cuda" or local_rank is None:
        return name
    elif torch.cuda.device_count() == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        local_rank = "0"  # as under Slurm, each process sees only its own GPU
    if int(local_rank) >= torch.cuda.device_count():
        raise ConfigError(
            f"Local rank {local_rank} has no GPU. Start at most {torch.cuda.device_count()} processes here."
        )
    torch.cuda.set_device(int(local_rank))  # otherwise some calls open a context on the first GPU, too
    return f"cuda:{local_rank}"


def send(values: "Tensor", target: "device") -> "Tensor":
    """Copy a tensor to a device, without waiting for it where the copy goes from the host to a GPU."""
    if target.type != "cuda" or values.is_cuda:
        return values.to(target)
    return values.pin_memory().to(target, non_blocking=True)  # only from pinned memory does a copy not wait
