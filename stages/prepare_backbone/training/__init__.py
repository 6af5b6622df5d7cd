"""Training of a guide: a small text-to-image latent diffusion model.

architecture.py   its sizes and its tokenizer
learner.py        steps: optimiser, average of the weights, CUDA graph, state
trainer.py        the two phases, autoencoder and denoiser, with checkpoints
samples.py        pictures that it draws
"""
