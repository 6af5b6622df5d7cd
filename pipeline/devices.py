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
    count, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if name.startswith("cuda:"):
        index = int(name.removeprefix("cuda:"))
        if index >= count:
            raise ConfigError(f"{setting} = {name}: this machine has {count} GPUs. Use a lower one.")
    elif name == "cuda" and local_rank is not None:
        sees_only_its_own = count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")  # as under Slurm
        index = 0 if sees_only_its_own else int(local_rank)
        if index >= count:
            raise ConfigError(f"Local rank {index} has no GPU. Start at most {count} processes here.")
    else:
        return name
    torch.cuda.set_device(index)  # otherwise some calls open a context on the first GPU, too
    return f"cuda:{index}"


def send(values: "Tensor", target: "device") -> "Tensor":
    """Copy a tensor to a device, without waiting for it where the copy goes from the host to a GPU."""
    if target.type != "cuda" or values.is_cuda:
        return values.to(target)
    return values.pin_memory().to(target, non_blocking=True)  # only from pinned memory does a copy not wait
