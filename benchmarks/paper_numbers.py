"""The numbers that the FedDifRC paper reports (https://arxiv.org/abs/2507.06482), as far as they could be verified.

CIFAR-10, accuracy in percent: ResNet-10, 10 clients, 5 per round, 50 rounds, 10 local epochs, batch size 64, SGD with
learning rate 0.01 and momentum 0.9. Cells that could not be verified are missing.
"""

PARTITIONS = {"nid1_005": "NID1, 0.05", "nid1_02": "NID1, 0.2", "nid1_05": "NID1, 0.5", "nid2": "NID2"}

METHODS: dict[str, dict[str, float]] = {
    "fedavg": {"nid1_005": 78.27, "nid1_02": 84.65, "nid1_05": 86.11, "nid2": 72.60},
    "fedprox": {"nid1_005": 78.42, "nid1_02": 84.59, "nid2": 72.81},
    "moon": {"nid1_005": 80.79, "nid1_02": 86.10, "nid2": 73.35},
    "fednh": {"nid1_005": 80.25},
    "feddifrc": {"nid1_005": 83.14, "nid1_02": 88.27, "nid1_05": 89.31, "nid2": 76.45},
}

ABLATION: dict[str, dict[str, float]] = {
    "tdcl": {"nid1_005": 81.39, "nid1_02": 86.03, "nid1_05": 88.16, "nid2": 75.67},
    "ndcr": {"nid1_005": 80.35, "nid1_02": 86.40, "nid1_05": 87.54, "nid2": 75.33},
    "layer2": {"nid1_02": 87.28, "nid2": 75.73},
    "layer3": {"nid1_02": 87.81, "nid2": 75.61},
}
"""The losses, and decoder layers alone; all layers with both losses are FedDifRC."""


def gain(method: str, other: str, partition: str) -> float | None:
    """Return the paper's gain of one method over another in points, or None if a cell is missing."""
    both = METHODS | ABLATION
    one, two = (both.get(name, {}).get(partition) for name in (method, other))
    return None if one is None or two is None else round(one - two, 2)
