"""Training of the shapes world models. Run `python -m training.train --output DIR` from a checkout."""
