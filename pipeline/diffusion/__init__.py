"""The frozen diffusion model as a feature extractor: what the stages that run it share.

backbones/          frozen diffusion models, one file a family
batching.py         batches that fit the memory
noise.py            the noise of each image
representation.py   maps -> PCA -> pooled representation
"""
