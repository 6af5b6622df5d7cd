"""The clients' networks. Each maps images to an embedding and the embedding to logits.

Guidance acts on the embedding. Where its length differs from that of the cached representations, a linear projector
stands between them; it is drawn from its own generator, so the rest of the network starts equal with or without it.
"""

from torch import Tensor, nn

from pipeline import seeding
from stages.train_fl.encoders import ENCODERS, EncoderName


class FLModel(nn.Module):
    """An encoder, a linear classifier on its embedding, and a projector to the space of the guidance."""

    def __init__(self, encoder: nn.Module, embedding_dim: int, num_classes: int) -> None:
        """Joins an encoder, images -> (B, embedding_dim), to a classifier."""
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self.projector: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (B, 3, H, W) in [-1, 1] -> what guidance sees (B, D) and logits (B, num_classes)."""
        embedding = self.encoder(images)
        return self.projector(embedding), self.classifier(embedding)


def build(name: EncoderName, num_classes: int, seed: int, guidance_dim: int | None = None) -> FLModel:
    """A model with weights drawn for this seed.

    Args:
        name: "small_cnn" (embedding 144, the length of tiny-sd's representations) or "resnet10" (512, as in the paper,
            the length of Stable Diffusion's).
        num_classes: length of the logits.
        seed: of the initial weights.
        guidance_dim: D of the cached representations; None for methods that use none.
    """
    encoder, embedding_dim = ENCODERS[name]
    with seeding.scoped_global_torch_seed(seed, "model"):
        model = FLModel(encoder(), embedding_dim, num_classes)
    if guidance_dim not in (None, embedding_dim):
        with seeding.scoped_global_torch_seed(seed, "projector"):
            model.projector = nn.Linear(embedding_dim, guidance_dim)
    return model
