"""Image features, by which pairs and sets of images are compared."""
