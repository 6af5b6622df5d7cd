"""Training without labels: FedDifRC's self-supervised form, and FedAvg with SimSiam as the baseline beside it.

    FedDifRC (Wang et al., ICCV 2025, https://arxiv.org/abs/2507.06482)
        L = lambda_tdcl * L_TDCL(z, F) + lambda_ndcr * L_NDCR(z, H)
    SimSiam (Chen and He, CVPR 2021, https://arxiv.org/abs/2011.10566)
        L = -1/2 cos(p_1, sg(v_2)) - 1/2 cos(p_2, sg(v_1)), views 1 and 2

No label is read if the feature set is self-supervised (`extract_features.prompts: self-supervised`): its positive
prompt fits every image. The paper does not say how it trains and evaluates this variant in a federation. Here both
methods aggregate as FedAvg, and a k-NN classifier and a linear probe on the frozen embeddings, which do use the
training labels, evaluate them. SimSiam needs neither negatives nor a momentum encoder, and so no state.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.settings.params import Guidance, MethodSettings, Section
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, Weights
from stages.train_fl.models import FLModel

_NEIGHBOURS = "k of the k-NN classifier that evaluates the embeddings"


class SelfSupervisedFedDifRC(FedAvg):
    """FedAvg on the two guidance losses, which local SGD adds, and no other."""

    class Settings(Guidance):  # type: ignore[assignment]  # the weights and targets of the two losses
        """See `Guidance`."""

        algorithm: Literal["feddifrc-self-supervised"] = "feddifrc-self-supervised"
        knn_neighbours: int = Field(20, ge=1, description=_NEIGHBOURS)

    needs_labels = False
    sends_only_weights = True
    capturable = True

    def __init__(self, local_sgd: LocalSGD, settings: Section | None = None, num_clients: int = 1) -> None:
        """Create the method; raise ConfigError if both losses are disabled."""
        super().__init__(local_sgd, settings, num_clients)
        if not self.settings.tdcl_weight + self.settings.ndcr_weight:
            raise ConfigError(
                f"{self.settings.algorithm} has nothing to train on (both losses have weight 0). Set tdcl_weight or "
                "ndcr_weight above 0."
            )

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the embeddings, without a term."""
        return model.embed(batch.images), {}


class SimSiam(FedAvg):
    """FedAvg on SimSiam's loss; the model's classifier is a `SimSiamHeads`."""

    class Settings(MethodSettings):
        """`head_dim` suits small images; the paper's ImageNet model has 2048."""

        algorithm: Literal["simsiam"] = "simsiam"
        head_dim: int = Field(
            128, ge=1, description="length of the projection; a quarter in the predictor's bottleneck"
        )
        knn_neighbours: int = Field(20, ge=1, description=_NEIGHBOURS)

    needs_labels = False
    needs_augmentation = True
    sends_only_weights = True
    capturable = True

    @classmethod
    def model_parts(cls, settings: Any) -> dict[str, Any]:
        """Replace the classifier by SimSiam's projection and predictor."""
        return {"simsiam_dim": settings.head_dim}

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD on two views of every image."""
        return super().client_update(weights, broadcast, state, replace(batches, num_views=2), learning_rate)

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the symmetric negative cosine; each view has its own pass and BatchNorm statistics."""
        assert batch.second_view is not None
        embeddings, (first, first_prediction) = model(batch.images)
        _, (second, second_prediction) = model(batch.second_view)
        return embeddings, {"simsiam": simsiam_loss(first, first_prediction, second, second_prediction)}


def simsiam_loss(first: Tensor, first_prediction: Tensor, second: Tensor, second_prediction: Tensor) -> Tensor:
    """Compute SimSiam's loss, the mean over the batch of -1/2 cos(p_1, v_2) - 1/2 cos(p_2, v_1), in [-1, 1].

    The projections v of the first and second views and the predictions p from them are float (B, D); v receives no
    gradient. The loss is -1 if every prediction has the direction of the other view's projection.
    """
    forward = functional.cosine_similarity(first_prediction, second.detach(), dim=1)
    backward = functional.cosine_similarity(second_prediction, first.detach(), dim=1)
    return -0.5 * (forward + backward).mean()
