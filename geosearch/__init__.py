"""Search by description over georeferenced imagery of one's own."""

from importlib import import_module
from typing import Any


# Imported when asked for: `geosearch --help` needs none of them.
_HOMES = {
    "IndexJob": "index",
    "build_index": "index",
    "open_index": "index_store",
    "load_index_encoder": "index_store",
    "search": "exact_search",
    "Area": "exact_search",
    "feature_table": "hits",
    "write_features": "hits",
    "print_hits": "hits",
    "ScenePictures": "pictures",
    "write_page": "page",
    "question_vector": "exact_search",
    "similarity_map": "locate",
    "places_of": "locate",
    "write_map": "locate",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
