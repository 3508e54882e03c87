"""Rewards that query a vision-language model about the image."""
