"""Rewards that ask a vision-language model about the image."""
