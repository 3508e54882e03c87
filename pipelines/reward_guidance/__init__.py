"""Reward guidance: rewards steer the denoising steps of a stock pipeline."""
