"""The job that `train.py` gives to every simulator: the clients' images, the network and the training settings."""

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stages.train_fl import models
from stages.train_fl.encoders import EncoderName, EncoderSettings
from stages.train_fl.models import FLModel

NUM_CLASSES = 10


@dataclass(frozen=True)
class Job:
    """FedAvg on random 32x32 images, whose content does not affect speed."""

    encoder: EncoderName
    num_clients: int
    clients_per_round: int
    samples_per_client: int
    num_rounds: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float

    def to_json(self) -> str:
        """Serialise for the command line of another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Parse the result of `to_json`."""
        return cls(**json.loads(text))

    def client(self, client_id: int) -> tuple[Tensor, Tensor]:
        """Return a client's images, uint8 (n, 3, 32, 32), and labels, int64 (n,)."""
        generator = torch.Generator().manual_seed(client_id)
        n = self.samples_per_client
        images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images, torch.randint(0, NUM_CLASSES, (n,), generator=generator)

    def model(self) -> FLModel:
        """Build the network, with the same weights for everyone."""
        return models.build(EncoderSettings(self.encoder, "batch", "float32", True), NUM_CLASSES, seed=0)


def seconds_per_round(marks: list[float]) -> dict[str, float]:
    """Return the seconds of the job, its first round and a later round, from times at the start and after each."""
    rounds = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    later = rounds[1:] or rounds
    return {
        "num_rounds": len(rounds),
        "job_seconds": marks[-1] - marks[0],
        "first_round_seconds": rounds[0],
        "round_seconds": sum(later) / len(later),
    }
