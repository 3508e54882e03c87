"""The result of a run: its file, its provenance and the settings that two runs differ in."""
