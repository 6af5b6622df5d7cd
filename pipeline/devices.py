"""The device to compute on."""

import os

from pipeline.errors import PipelineError


def resolve(name: str) -> str:
    """A torch device for `runtime.device`; "auto" is a GPU where there is one.

    Of several GPUs a process started by accelerate or torchrun takes the one of its local rank.

    Raises:
        PipelineError: a GPU is asked for that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PipelineError(f"runtime.device = {name}: this machine has no usable CUDA GPU; use auto or cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    if name != "cuda" or local_rank is None:
        return name
    if int(local_rank) >= torch.cuda.device_count():
        raise PipelineError(f"local rank {local_rank} has no GPU: launch {torch.cuda.device_count()} processes here")
    return f"cuda:{local_rank}"
