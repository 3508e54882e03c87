"""Rewards trained on human preferences, and image-text similarity."""
