"""The training of the models of the shapes world: `python -m training.train --output DIR` from a checkout."""
