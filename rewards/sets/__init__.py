"""Rewards of a set of images: how much they differ."""
