"""The federated methods, one file per paper. Importing a method's file registers it; `build` creates one."""

from pipeline.errors import ConfigError
from pipeline.settings.params import Guidance, Section
from stages.train_fl.graphs import Graphs
from stages.train_fl.methods.base import Method, method_class
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.fedavgm import FedAvgM
from stages.train_fl.methods.fedcr import FedCR
from stages.train_fl.methods.feddifrc import FedDifRC, GuidanceLoss
from stages.train_fl.methods.feddyn import FedDyn
from stages.train_fl.methods.fednh import FedNH
from stages.train_fl.methods.fednova import FedNova
from stages.train_fl.methods.fedproto import FedProto
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.methods.moon import Moon
from stages.train_fl.methods.scaffold import Scaffold
from stages.train_fl.methods.self_supervised import SelfSupervisedFedDifRC, SimSiam
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.models import FLModel

__all__ = [
    "ClientState", "ClientUpdate", "FedAvg", "FedAvgM", "FedCR", "FedDifRC", "FedDyn", "FedNH", "FedNova", "FedProto",
    "FedProx", "LocalSGD", "Method", "Metrics", "Moon", "Scaffold", "SelfSupervisedFedDifRC", "ServerState", "SimSiam",
    "Weights", "build", "check", "guidance_of", "method_class",
]  # fmt: skip


def guidance_of(settings: Section) -> Guidance | None:
    """Return the guidance of a `methods:` entry: FedDifRC's own settings, another's `guidance` section, or None."""
    return settings if isinstance(settings, Guidance) else getattr(settings, "guidance", None)


def check(kind: type[Method], settings: Section, augmentation: str, name: str) -> None:
    """Raise ConfigError, which calls the method `name`, if its settings or the augmentation do not suit its class."""
    if kind.needs_augmentation and augmentation == "none":
        raise ConfigError(
            f"{name} compares two views of each image, but train_fl.augmentation is none. Set it to views (or crop)."
        )
    if not kind.needs_labels and not hasattr(settings, "knn_neighbours"):
        raise ConfigError(
            f"{name} trains without labels, but has no setting knn_neighbours for the k-NN classifier that evaluates "
            "it. Add it to its class's Settings, as SimSiam does."
        )


def build(
    settings: Section,
    model: FLModel,
    momentum: float,
    weight_decay: float,
    num_clients: int,
    gradient_clipping: float | None = None,
    kind: type[Method] | None = None,
    use_graphs: bool = True,
) -> Method:
    """Create the method of a `methods:` entry.

    Args:
        settings: The entry's settings.
        model: The network to train, with the `model_parts` of the method.
        momentum: Momentum of local SGD.
        weight_decay: L2 penalty of local SGD.
        num_clients: N, the number of all clients.
        gradient_clipping: Largest norm of a step's gradient; None for no limit.
        kind: The class to create, if it is not the one that registered the type of `settings`.
        use_graphs: On a GPU, replay training steps as CUDA graphs, if the method is `capturable`.
    """
    kind = kind or method_class(settings)
    loss = GuidanceLoss(guidance) if (guidance := guidance_of(settings)) else None
    graphs = Graphs() if use_graphs and kind.capturable else None
    local_sgd = LocalSGD(model, momentum, weight_decay, loss, gradient_clipping, graphs)
    return kind(local_sgd, settings, num_clients)
