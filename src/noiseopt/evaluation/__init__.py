"""Evaluation of noise optimization: rewards, prompt alignment, diversity, and the noise itself."""
