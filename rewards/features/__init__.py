"""Feature maps: what the images of a set are compared by."""
