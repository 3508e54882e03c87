"""Objectives, regularizers, noise optimizers and the pipelines that carry the optimisation hook."""
