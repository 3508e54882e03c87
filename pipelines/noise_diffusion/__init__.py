"""Noise Diffusion: Gaussian noise chosen by a vision-language model, https://arxiv.org/abs/2411.16503."""
