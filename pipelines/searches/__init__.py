"""Searches without gradients: best-of-N, zero-order search, pCN and group selection."""
