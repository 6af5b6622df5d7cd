"""Stage prepare-backbone: the frozen diffusion model -> models/<name>, its manifest -> data/backbones/<name>.json."""

from stages.prepare_backbone.run import run

__all__ = ["run"]
