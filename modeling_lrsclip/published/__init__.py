"""Published CLIP checkpoints: which exist, where they are, and how their files are read."""
