"""The frozen diffusion model as a feature extractor: what the stages that run it share.

backbones/             frozen diffusion models, one file a family
prompts.py             which prompts an image is shown with
image_conditioning.py  optionally, the image itself as part of the prompt
prompted_model.py      the frozen model under its prompts: pairs (image, prompt) -> maps
batching.py            batches that fit the memory
noise.py               the noise of each image
representation.py      maps -> PCA -> pooled representation
"""
