"""Texts and images to unit embeddings, under the name that scripts of other people know; see `modeling_lrsclip.encoding`."""

from modeling_lrsclip.encoding import embed_images, embed_texts


__all__ = ["embed_images", "embed_texts"]
