"""The Hub repositories of this project, and the command `noiseopt hub`, which writes, checks and pushes them."""
