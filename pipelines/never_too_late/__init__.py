"""It's Never Too Late: end-to-end optimization of diverse sets, https://arxiv.org/abs/2601.00090."""
