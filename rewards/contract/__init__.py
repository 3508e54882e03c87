"""The base class of rewards, their registry, their weighted sum and the loading of checkpoints."""
