"""The federated methods: one paper, one file. `build` makes the one that the configuration names."""

import torch

from pipeline.params import FedAvg as FedAvgParams
from pipeline.params import FedDifRC as FedDifRCParams
from pipeline.params import Section
from stages.train_fl.methods.base import ClientState, ClientUpdate, Method, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.feddifrc import FedDifRC, GuidanceSettings, make_targets
from stages.train_fl.methods.local_sgd import LocalSGD

__all__ = ["ClientState", "ClientUpdate", "LocalSGD", "Method", "Metrics", "ServerState", "Weights", "build"]


def build(params: Section, local_sgd: LocalSGD, statistics: tuple[torch.Tensor, torch.Tensor] | None) -> Method:
    """The method of a `methods:` entry.

    Args:
        params: the entry's settings.
        local_sgd: the local training.
        statistics: mean and std (D,) of the feature set; None for methods without guidance.
    """
    if isinstance(params, FedAvgParams):
        return FedAvg(local_sgd)
    assert isinstance(params, FedDifRCParams)
    assert statistics is not None
    settings = GuidanceSettings(**params.model_dump(exclude={"algorithm"}))
    return FedDifRC(local_sgd, settings, make_targets(*statistics))
