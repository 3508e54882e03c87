"""How optimised noise differs from the noise it began as: functions of tensors, and `noiseopt analyze`."""
