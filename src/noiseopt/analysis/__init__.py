"""The difference between optimized and initial noise: `noiseopt analyze`, and functions of tensors.

>>> from noiseopt.analysis.coherence import coherence
>>> from noiseopt.analysis.distances import l2_table
>>> found = coherence(result.initial_noise, result.noise)
>>> l2_table(result.initial_noise, result.noise)
"""
