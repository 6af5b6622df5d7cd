"""DiT: a diffusion transformer conditioned on ImageNet's classes, not on text (Peebles and Xie, ICCV 2023).

A prompt is therefore the name of one of its classes, as model_index.json lists them, or "" for the class-free
embedding: set `prompt_templates: ["{class_name}"]`, and map a data set's classes to ImageNet's by `class_prompts`.
"""

import json
from functools import cached_property

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from pipeline.diffusion.backbones.base import Conditioning, TokenBackbone
from pipeline.errors import PipelineError


class DiTBackbone(TokenBackbone):
    """A DiTTransformer2DModel."""

    model_class = DiTTransformer2DModel

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return class numbers (K,); raise PipelineError if a prompt does not name exactly one known class."""
        for prompt in prompts:
            if prompt not in self._classes:
                raise PipelineError(
                    f"{self.path.name} is conditioned on {self._model.config.num_embeds_ada_norm} classes, and "
                    f"{prompt!r} is not one of their names. Set extract_features.prompt_templates to "
                    '["{class_name}"], and class_prompts to a file that gives each class one of the names.'
                )
        texts = iter(prompts)
        groups = [[next(texts) for _ in range(size)] for size in sizes or [1] * len(prompts)]
        for group in groups:
            if len({self._classes[prompt] for prompt in group}) > 1:
                raise PipelineError(
                    f"{self.path.name} is conditioned on one class at a time, and a prompt's texts name several "
                    f"({', '.join(map(repr, group))}). Give each class one text."
                )
        labels = torch.tensor([self._classes[group[0]] for group in groups], device=self.device)
        table = self._model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        with torch.inference_mode():
            return Conditioning({"class_labels": labels}, table(labels).float().cpu())

    @cached_property
    def _classes(self) -> dict[str, int]:
        """Map each name of a class to its number, and "" to the embedding for no class."""
        index = json.loads((self.path / "model_index.json").read_text(encoding="utf-8"))
        labels: dict[str, str] = index.get("id2label", {})
        named = {name.strip(): int(number) for number, names in labels.items() for name in names.split(",")}
        named |= {names.strip(): int(number) for number, names in labels.items()}
        return named | {"": self._model.config.num_embeds_ada_norm}

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        self._model(noisy, timestep=timesteps, return_dict=False, **conditioning)
