"""Random guidance targets in place of a feature set that does not exist yet, for estimates before an extraction.

Their size follows from the settings, the class names and the frozen model's configuration.
"""

import functools

import numpy as np
import torch

from pipeline import memory
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import prompts, representation
from pipeline.errors import DataError
from pipeline.io.system_errors import status
from pipeline.settings.config import Config
from pipeline.settings.params import Guidance
from stages.train_fl import feature_check, losses
from stages.train_fl.guidance import GuidanceTargets, bytes_per_sample, columns


class PlannedSource:
    """A `guidance.TargetSource` of random targets."""

    def __init__(self, settings: Guidance, num_prompts: int, num_dims: int) -> None:
        """Make targets of `num_dims` numbers, for `num_prompts` prompts per image."""
        self._settings, self._num_prompts, self.num_dims = settings, num_prompts, num_dims

    def bytes_per_sample(self) -> int:
        """Return the size of a sample's targets in memory."""
        return bytes_per_sample(self._settings, self._num_prompts, self.num_dims)

    def read(self, index: np.ndarray, device: str | torch.device = "cpu") -> GuidanceTargets:
        """Return targets of unit length for n samples; a representation that no term uses is empty, (n, 0)."""
        n, generator = len(index), torch.Generator().manual_seed(0)
        shapes = {"denoised": (n, self.num_dims), "prompted": (n, self._num_prompts, self.num_dims)}
        used = {"denoised": self._settings.ndcr_weight > 0, "prompted": self._settings.tdcl_weight > 0}
        values = {
            name: losses.unit(torch.rand(shape, generator=generator)) if used[name] else torch.empty(n, 0)
            for name, shape in shapes.items()
        }
        return GuidanceTargets(**values, positive=torch.zeros(n, dtype=torch.int64)).to(device)


def is_needed(config: Config) -> bool:
    """Return whether the feature set is missing; DataError without a frozen model, which says what it would hold."""
    if status(config.features_dir / "manifest.json"):
        return False
    if not status(config.backbone_dir / "model_index.json"):
        raise DataError(
            f"{config.features_dir} holds no feature set yet, and {config.backbone_dir} no frozen model to plan one. "
            "Run `pipeline prepare-backbone`."
        )
    return True


@functools.cache
def library_bytes() -> int:
    """Import diffusers, which training does without, and return the memory that this took."""
    before = memory.peak()
    from pipeline.diffusion import backbones  # noqa: F401

    return memory.peak() - before


def source(config: Config, guidance: Guidance, needs_labels: bool, method: str) -> PlannedSource:
    """Plan the targets of the feature set that params.yaml describes, for a method; see `is_needed`.

    Raises:
        ConfigError: `guidance` names a layer that the set will not have.
        FeatureSetError: Its prompts do not suit the method.
        PipelineError: The data set is missing, or the settings do not fit the model.
    """
    from pipeline.diffusion import backbones

    params = config.params.extract_features
    channels = backbones.layer_channels(config.backbone_dir, params.layers)
    layers = representation.column_ranges(channels, params.dims)
    texts = prompts.build(params, PreparedDataset(config.dataset_dir).class_names, config.path)
    feature_check.check_prompts(texts.positive, needs_labels, method, "params.yaml asks for a feature set with")
    return PlannedSource(guidance, prompts.per_image(texts, params.negatives), len(columns(guidance, layers)))
