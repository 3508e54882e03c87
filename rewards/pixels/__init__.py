"""Rewards of pixels, which need no model."""
