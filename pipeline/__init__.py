"""FedDifRC as a two-stage pipeline: run the frozen diffusion model once, train federated from its cached features."""

__version__ = "0.1.0"
