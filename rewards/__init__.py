"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""
