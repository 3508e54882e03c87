"""Rewards that are formulas of the pixels and need no model."""
