"""The frozen diffusion model as a feature extractor, shared by the stages that run it.

backbones/             frozen diffusion models, one file per family
frozen_model.py        the model's manifest, and checks of its files
families.py            which published models are supported
session.py             a model loaded for one data set
prompts.py             the prompts of each image
distinct_prompts.py    whether the model can tell them apart
prompted_model.py      passes: pairs (image, prompt) -> maps
image_conditioning.py  optional CLIP image embeddings, added to the prompts
batching.py            batches sized to fit memory
noise.py               per-image noise
representation.py      maps -> PCA -> pooled representation
"""
