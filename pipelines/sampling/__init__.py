"""The stock pipeline as a differentiable function of its initial noise."""
