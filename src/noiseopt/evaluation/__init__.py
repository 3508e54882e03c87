"""Measuring what noise optimization does: rewards, prompts followed, differences within sets, and the noise itself."""
