"""Differentiable evaluation of a stock pipeline as a function of its initial noise."""
