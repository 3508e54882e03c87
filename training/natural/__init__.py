"""Training of models with natural noise: noises independent of the data, larger latents, and usual layouts."""
