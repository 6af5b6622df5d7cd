"""The frozen diffusion model as a feature extractor: what the stages that run it share.

backbones/          frozen diffusion models, one file a family
batching.py         batches that fit the memory
representation.py   maps -> PCA -> pooled representation
"""
