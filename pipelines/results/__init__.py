"""The result of a run, its file, its provenance and the differences between settings."""
