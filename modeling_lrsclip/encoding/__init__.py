"""Texts and images to unit embeddings, and the one way to open imagery. Does not travel with a checkpoint."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .embedding import embed_images, embed_texts
    from .encoder import Embeddings, Encoder, load_encoder

__all__ = ["Embeddings", "Encoder", "embed_images", "embed_texts", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Import torch with the first of these names: those who only open imagery wait seconds less."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import embedding, encoder

    return getattr(embedding if name.startswith("embed_") else encoder, name)
