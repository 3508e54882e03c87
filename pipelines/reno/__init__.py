"""ReNO: reward-based noise optimization of one-step models, https://arxiv.org/abs/2406.04312."""
