"""The device to compute on."""

import os

from pipeline.errors import ConfigError


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
    if name != "cuda" or local_rank is None:
        return name
    if int(local_rank) >= torch.cuda.device_count():
        raise ConfigError(
            f"Local rank {local_rank} has no GPU. Start at most {torch.cuda.device_count()} processes here."
        )
    return f"cuda:{local_rank}"
