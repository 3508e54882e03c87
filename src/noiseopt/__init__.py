"""noiseopt: choose and optimise the initial noise of diffusers text-to-image pipelines."""
