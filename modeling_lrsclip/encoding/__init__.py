"""Texts and images to unit embeddings, and the one way to open imagery. Does not travel with a checkpoint."""

from .embedding import embed_images, embed_texts
from .encoder import Embeddings, Encoder, load_encoder


__all__ = ["Embeddings", "Encoder", "embed_images", "embed_texts", "load_encoder"]
