"""The contract of rewards, their registry, their weighted sum and what loads their checkpoints."""
