"""Where sampling starts: noise samplers and the x0 that a scheduler predicts."""
