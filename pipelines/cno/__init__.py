"""CNO: contrastive noise optimization of diverse batches, https://arxiv.org/abs/2510.03813."""
