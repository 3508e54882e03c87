"""Memory and time of gradients: checkpointing, chunks, lean layers and tiny decoders."""
