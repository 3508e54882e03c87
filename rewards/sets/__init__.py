"""Rewards for the diversity of a set of images."""
