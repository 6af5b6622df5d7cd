"""Training without labels: FedDifRC's self-supervised form, and FedAvg with SimSiam as the baseline beside it.

    FedDifRC (Wang et al., ICCV 2025):   L = lambda_tdcl * L_TDCL(z, F) + lambda_ndcr * L_NDCR(z, H)
    SimSiam (Chen and He, CVPR 2021):    L = -1/2 cos(p_1, sg(v_1')) - 1/2 cos(p_2, sg(v_2')), views 1 and 2

No label is read if the feature set is self-supervised (`extract_features.prompts: self-supervised`): the positive
prompt is then one that fits every image. The paper does not say how it trains and judges this variant in a federation;
here clients run local SGD and FedAvg aggregates, and a k-NN classifier and a linear probe on the frozen embeddings,
which do use the training labels, judge both methods alike. SimSiam needs neither negatives nor a momentum encoder, and
so no state; with `guidance` FedDifRC's terms go on top of it.
"""

from torch import Tensor
from torch.nn import functional

from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.models import FLModel


class SelfSupervisedFedDifRC(FedAvg):
    """FedAvg on the guidance's terms alone, which local SGD adds."""

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """No term of its own."""
        return model.embed(batch.images), {}


class SimSiam(FedAvg):
    """FedAvg on SimSiam's loss; the model's classifier is a `SimSiamHeads`."""

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD on two views of every image."""
        return super().client_update(weights, broadcast, state, batches.with_two_views(), learning_rate)

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The symmetric negative cosine; each view is a forward pass of its own, with its own BatchNorm statistics."""
        assert batch.second_view is not None
        embeddings, (first, first_prediction) = model(batch.images)
        _, (second, second_prediction) = model(batch.second_view)
        loss = simsiam_loss(first, first_prediction, second, second_prediction)
        return embeddings, {"simsiam": loss}


def simsiam_loss(first: Tensor, first_prediction: Tensor, second: Tensor, second_prediction: Tensor) -> Tensor:
    """The mean over the batch of -1/2 cos(p_1, v_2) - 1/2 cos(p_2, v_1).

    Args:
        first: projections v_1 of the first views, float (B, D); receive no gradient.
        first_prediction: p_1, the predictor's output for them, float (B, D).
        second: projections v_2 of the second views; receive no gradient.
        second_prediction: p_2.

    Returns:
        Scalar in [-1, 1]; -1 if every prediction points where the other view's projection does.
    """
    forward = functional.cosine_similarity(first_prediction, second.detach(), dim=1)
    backward = functional.cosine_similarity(second_prediction, first.detach(), dim=1)
    return -0.5 * (forward + backward).mean()
