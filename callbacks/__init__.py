"""Callbacks: what may watch, steer or stop a noise optimisation."""
