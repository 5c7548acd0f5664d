"""A row of the data set: one image, one long and one short text, and where each of them comes from."""

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow


GIVEN = "given"  # the captioner of a text that came with the source
SPLITS = ("train", "validation")

VERIFY_COLUMNS = ("long_similarity", "short_similarity", "sentence_similarities", "claims", "claims_confirmed")

Row = dict[str, Any]  # the columns of `schema`


@functools.cache
def schema() -> pyarrow.Schema:
    """Columns of the data set, with the mark by which `datasets` decodes the image."""
    from datasets import Features, Image, List, Value  # a second, which --help and --check do without

    text, count, degrees, share = Value("string"), Value("int32"), Value("float64"), Value("float32")
    columns = Features(
        {
            "id": text,  # unique: the source's name and the row's place in it
            "image": Image(),  # null in a data set without pixels
            "image_key": text,  # the image's path or name in its source; several rows may share it
            "long_text": text,
            "short_text": text,
            "short_texts": List(text),  # all given short captions, where several belong to this row; else null
            "source": text,
            "licence": text,
            "route": text,  # merge, compress, expand or anchor
            "class_name": text,  # null where the source has none
            "long_captioner": text,  # its id, "given" or "template"
            "short_captioner": text,
            "long_prompt": text,  # name@version; null for a given text
            "short_prompt": text,
            "long_prompt_hash": text,
            "short_prompt_hash": text,
            "sampling": text,  # JSON: per text the settings and the seed its answer was asked with
            "seed": Value("int64"),  # of the recipe
            "long_tokens": count,  # CLIP's, start and end included
            "short_tokens": count,
            "short_words": count,
            "image_sha256": text,  # of the file in the source
            "width": count,  # pixels, after the EXIF turn
            "height": count,
            "longitude": degrees,  # of the image's centre, WGS 84; null where unknown
            "latitude": degrees,
            "gsd": degrees,  # ground sample distance, metres a pixel
            "anchors": text,  # JSON: counts, objects and the sentence the captioner read; null without labels
            "label_precision": share,  # of the classes that the long text names, the share that is labelled; null without labels
            "label_recall": share,  # of the labelled classes, the share that the long text names
            # Of training.lrs2m.verify; null before it.
            "long_similarity": share,  # cosine of the long text and the image; of a model of 77 positions, the sentences' mean
            "short_similarity": share,
            "sentence_similarities": List(share),  # of each sentence of the long text
            "claims": text,  # JSON: kind, question and answer (true, false or null) of each claim of the long text
            "claims_confirmed": share,  # of the claims that were answered
            "warnings": List(text),  # checks at level `warn` that found a fault, with the text: "long: agreement"
        }
    )
    return columns.arrow_schema


@dataclass
class Record:
    """One row as its source has it, before images are opened and texts are made."""

    source: str
    position: int  # in the source, from 0
    image: Any  # a path, the file's bytes, or {"bytes", "path"}
    image_key: str
    long_text: str | None = None
    short_text: str | None = None
    short_texts: list[str] | None = None  # where several belong to one row
    class_name: str | None = None
    longitude: float | None = None  # degrees
    latitude: float | None = None
    gsd: float | None = None  # metres a pixel
    date: str | None = None  # ISO 8601, for metadata captions
    labels: Any = None  # objects of the source's own column, as stored there
    bounds: tuple[float, float, float, float] | None = None  # min x, min y, max x, max y in the labels' units
    fields: dict[str, Any] = field(default_factory=dict)  # further columns, for templates

    @property
    def id(self) -> str:
        return f"{self.source}-{self.position:08d}"


def split_of(image_sha256: str, seed: int, validation_fraction: float) -> str:
    """
    The split of an image: a function of its content and the seed, so that all its rows are in one.

    Args:
        image_sha256: hash of the image's bytes.
        seed: of the recipe.
        validation_fraction: share of the images, from 0 to 1.

    Returns:
        `train` or `validation`.
    """
    digest = hashlib.sha256(f"{seed}/{image_sha256}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[1] if share < validation_fraction else SPLITS[0]
