"""The contract of a federated method: pure functions with explicit state (after FedJAX's design).

An engine holds the states and calls the functions. A method does not know whether its clients run in one process or on
many machines.
"""

from typing import Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.settings import params
from pipeline.settings.params import Section
from stages.train_fl.client_data import Batches
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights

_CLASSES: dict[type[Section], "type[Method]"] = {}


class Method:
    """Base class of the federated methods.

    A subclass with a nested `Settings` class is a method of its own: defining it registers it, and a `methods:` entry
    selects it by the value of `algorithm`, a Literal with a default.

    Attributes:
        Settings: Settings of a `methods:` entry; their defaults are the paper's values.
        needs_labels: Whether training reads labels. If not, the embeddings are evaluated, by a linear probe and by
            k-NN, whose k is the setting `knn_neighbours`.
        needs_augmentation: Whether training compares random views of an image.
        sends_only_weights: Whether clients send their weights and nothing else, and the server takes their mean and
            keeps nothing. Only such methods can run with differential privacy.
        capturable: Whether a training step only queues work on a GPU: it reads no value back, copies nothing from the
            host and draws no random numbers. Such steps are replayed as CUDA graphs (`graphs`), and clients of a round
            train side by side on one GPU.
    """

    Settings: ClassVar[type[Section]]
    needs_labels: ClassVar[bool] = True
    needs_augmentation: ClassVar[bool] = False
    sends_only_weights: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register a method that has settings of its own; raise ConfigError if another has the same `algorithm`."""
        # Never inherited: a subclass may send or do more than the class it derives from.
        for name in ("sends_only_weights", "capturable"):
            if name not in vars(cls):
                setattr(cls, name, False)
        if "Settings" not in vars(cls):
            return
        algorithm = cls.Settings.model_fields["algorithm"].default
        registered = params.METHODS.get(algorithm)
        # A class of the same name and module is a redefinition, as when a notebook cell runs again.
        if registered and _identity(registered) != _identity(cls.Settings):
            raise ConfigError(f'Algorithm "{algorithm}" is already defined by {_identity(registered)}. Rename one.')
        params.METHODS[algorithm] = cls.Settings
        _CLASSES[cls.Settings] = cls

    def __init__(self, local_sgd: LocalSGD, settings: Section | None = None, num_clients: int = 1) -> None:
        """Create the method.

        Args:
            local_sgd: The local training, which holds the network.
            settings: An instance of `Settings`; None for the defaults.
            num_clients: N, the number of all clients, sampled or not.
        """
        self.local_sgd = local_sgd
        self.settings: Any = settings or self.Settings()
        self.num_clients = num_clients

    @classmethod
    def model_parts(cls, settings: Any) -> dict[str, Any]:
        """Return the parts that the method adds to its model, as arguments of `models.build`."""
        return {}

    def init_server(self, weights: Weights) -> ServerState:
        """Return the server's state before the first round."""
        return ServerState(weights)

    def init_client(self, weights: Weights) -> ClientState:
        """Return a client's state before its first round, from the server's weights of that round."""
        return {}

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Train locally from the server's weights, without changing any argument.

        Args:
            weights: The server's weights.
            broadcast: The server's other tensors.
            state: The client's state after its last round.
            batches: The client's data.
            learning_rate: The rate of this round.

        Returns:
            The update to send, the state to keep, and the mean of each term of the loss.
        """
        raise NotImplementedError

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Aggregate one round's updates, without changing any argument."""
        raise NotImplementedError

    def reported_weights(self, state: ServerState) -> Weights:
        """Return the global model to evaluate and save; for all methods but FedDyn the weights clients start from."""
        return state.weights


def method_class(settings: Section) -> type[Method]:
    """Return the method that a `methods:` entry selects."""
    return _CLASSES[type(settings)]


def _identity(settings: type[Section]) -> str:
    return f"{settings.__module__}.{settings.__qualname__}"
