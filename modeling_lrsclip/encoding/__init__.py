"""Texts and images to unit embeddings, and the one way to open imagery. Does not travel with a checkpoint."""

from .encoder import embed_images, embed_texts


__all__ = ["embed_images", "embed_texts"]
