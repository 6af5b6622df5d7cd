"""The federated methods: one paper, one file. `build` makes the one that the configuration names."""

from typing import Any

from pipeline.errors import PipelineError
from pipeline.settings import params
from stages.train_fl.methods.base import ClientState, ClientUpdate, Method, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.fedavgm import FedAvgM
from stages.train_fl.methods.fedcr import FedCR
from stages.train_fl.methods.feddifrc import GuidanceLoss
from stages.train_fl.methods.feddyn import FedDyn
from stages.train_fl.methods.fednh import FedNH
from stages.train_fl.methods.fednova import FedNova
from stages.train_fl.methods.fedproto import FedProto
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.methods.moon import Moon
from stages.train_fl.methods.scaffold import Scaffold
from stages.train_fl.methods.self_supervised import SelfSupervisedFedDifRC, SimSiam
from stages.train_fl.models import FLModel

__all__ = [
    "ClientState",
    "ClientUpdate",
    "LocalSGD",
    "Method",
    "Metrics",
    "ServerState",
    "Weights",
    "build",
    "guidance_of",
    "model_parts",
]

_METHODS: dict[type[params.Section], type[FedAvg]] = {
    params.FedAvg: FedAvg,
    params.FedProx: FedProx,
    params.Scaffold: Scaffold,
    params.FedNova: FedNova,
    params.Moon: Moon,
    params.FedNH: FedNH,
    params.FedCR: FedCR,
    params.FedDyn: FedDyn,
    params.FedAvgM: FedAvgM,
    params.FedProto: FedProto,
    params.FedDifRC: FedAvg,
    params.SimSiam: SimSiam,
    params.SelfSupervisedFedDifRC: SelfSupervisedFedDifRC,
}
_PARTS = {"scale": "cosine_scale", "latent_dim": "latent_dim", "head_dim": "simsiam_dim"}


def guidance_of(section: params.Section) -> params.Guidance | None:
    """The guidance of a `methods:` entry: FedDifRC's own settings, another method's `guidance` section, or None."""
    return section if isinstance(section, params.Guidance) else getattr(section, "guidance", None)


def model_parts(section: params.Section) -> dict[str, Any]:
    """The parts that an entry's method needs in its model, as arguments of `models.build`."""
    return {part: getattr(section, key) for key, part in _PARTS.items() if hasattr(section, key)}


def build(
    section: params.Section,
    model: FLModel,
    momentum: float,
    weight_decay: float,
    num_clients: int,
    gradient_clipping: float | None = None,
) -> Method:
    """The method of a `methods:` entry.

    Args:
        section: the entry's settings.
        model: the network to train in, with the entry's `model_parts`.
        momentum: of local SGD.
        weight_decay: of local SGD.
        num_clients: N, all clients, which SCAFFOLD's and FedDyn's servers must know.
        gradient_clipping: largest norm of a step's gradient; None: no limit.

    Raises:
        PipelineError: training without labels has both of its losses switched off.
    """
    guidance = guidance_of(section)
    loss = GuidanceLoss(guidance) if guidance else None
    local_sgd = LocalSGD(model, momentum, weight_decay, loss, gradient_clipping)
    if isinstance(section, params.SelfSupervisedFedDifRC) and not section.tdcl_weight + section.ndcr_weight:
        raise PipelineError(f"{section.algorithm} has nothing to train on: set tdcl_weight or ndcr_weight above 0")
    if isinstance(section, params.Guidance):
        return _METHODS[type(section)](local_sgd)
    settings = section.model_dump(exclude={"algorithm", "guidance", "knn_neighbours", *_PARTS})
    if isinstance(section, (params.Scaffold, params.FedDyn)):
        settings["num_clients"] = num_clients
    return _METHODS[type(section)](local_sgd, **settings)
