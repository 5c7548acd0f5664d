"""Near-duplicates of images, inside a set and against evaluation images."""
