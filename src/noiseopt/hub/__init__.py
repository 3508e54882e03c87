"""The Hub repositories of this project, and `noiseopt hub`, which writes, draws, checks and pushes them."""
