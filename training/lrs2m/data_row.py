"""A row of the data set: one image, one long and one short text, and where each of them comes from."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow
from datasets import Features, Image, List, Value


GIVEN = "given"  # the captioner of a text that came with the source
SPLITS = ("train", "validation")

VERIFY_COLUMNS = ("long_similarity", "short_similarity", "sentence_similarities", "claims", "claims_confirmed")

_TEXT, _COUNT, _DEGREES, _SHARE = Value("string"), Value("int32"), Value("float64"), Value("float32")
FEATURES = Features(
    {
        "id": _TEXT,  # unique: the source's name and the row's place in it
        "image": Image(),  # null in a data set without pixels
        "image_key": _TEXT,  # the image's path or name in its source; several rows may share it
        "long_text": _TEXT,
        "short_text": _TEXT,
        "short_texts": List(_TEXT),  # all given short captions, where several belong to this row; else null
        "source": _TEXT,
        "licence": _TEXT,
        "route": _TEXT,  # merge, compress, expand or anchor
        "class_name": _TEXT,  # null where the source has none
        "long_captioner": _TEXT,  # its id, "given" or "template"
        "short_captioner": _TEXT,
        "long_prompt": _TEXT,  # name@version; null for a given text
        "short_prompt": _TEXT,
        "long_prompt_hash": _TEXT,
        "short_prompt_hash": _TEXT,
        "sampling": _TEXT,  # JSON: per text the settings and the seed its answer was asked with
        "seed": Value("int64"),  # of the recipe
        "long_tokens": _COUNT,  # CLIP's, start and end included
        "short_tokens": _COUNT,
        "short_words": _COUNT,
        "image_sha256": _TEXT,  # of the file in the source
        "width": _COUNT,  # pixels, after the EXIF turn
        "height": _COUNT,
        "longitude": _DEGREES,  # of the image's centre, WGS 84; null where unknown
        "latitude": _DEGREES,
        "gsd": _DEGREES,  # ground sample distance, metres a pixel
        "anchors": _TEXT,  # JSON: counts, objects and the sentence the captioner read; null without labels
        "label_precision": _SHARE,  # of the classes that the long text names, the share that is labelled; null without labels
        "label_recall": _SHARE,  # of the labelled classes, the share that the long text names
        # Of training.lrs2m.verify; null before it.
        "long_similarity": _SHARE,  # cosine of the long text and the image; of a model of 77 positions, the sentences' mean
        "short_similarity": _SHARE,
        "sentence_similarities": List(_SHARE),  # of each sentence of the long text
        "claims": _TEXT,  # JSON: kind, question and answer (true, false or null) of each claim of the long text
        "claims_confirmed": _SHARE,  # of the claims that were answered
        "warnings": List(_TEXT),  # checks at level `warn` that found a fault, with the text: "long: agreement"
    }
)
SCHEMA: pyarrow.Schema = FEATURES.arrow_schema  # carries the mark by which `datasets` decodes the image

Row = dict[str, Any]  # the columns above


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
