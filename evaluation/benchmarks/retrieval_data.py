"""
Images and their captions for text-image retrieval, from a folder, a file or the Hub.

M images, N texts; a text belongs to one image, an image has one text or several.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.files.hashing import json_sha256
from modeling_lrsclip.files.tables import USUAL_COLUMNS, json_list_name, read_rows, text_encoding

from . import tables
from .tables import FORMATS, MissingColumn, NotHere, Table, complain


IN_A_FOLDER = (  # what is looked for, in this order
    "test.parquet",
    "test-*.parquet",
    "data/test-*.parquet",  # a clone of a data set of the Hub
    "dataset_*.json",  # RSITMD, RSICD, UCM-Captions, after Karpathy's files
    "*_test.csv",  # RS5M's test data
    "test_caps.txt",  # AMFMN's *_precomp
    *(f"{stem}{suffix}" for stem in ("test", "captions") for suffix in FORMATS[1:]),
)
OTHERWISE = (  # may also lie beside the folders of several benchmarks
    *(f"metadata{suffix}" for suffix in FORMATS[1:]),
    "train.parquet",
    "train-*.parquet",
    "data/train-*.parquet",
    *(f"train{suffix}" for suffix in FORMATS[1:]),
    "*.tar",
)
KINDS = ("image", "long", "short")  # of columns that may be named


class PublishedSplit(NamedTuple):
    """A benchmark's test split as published (paper, V-B 1; RSITMD-L and RSICD-L have one long text an image)."""

    name: str
    images: int
    texts: int


PUBLISHED_SPLITS = {
    ("rsitmd", "short_text"): PublishedSplit("RSITMD", 452, 5 * 452),
    ("rsitmd", "long_text"): PublishedSplit("RSITMD-L", 452, 452),
    ("rsicd", "short_text"): PublishedSplit("RSICD", 1093, 5 * 1093),
    ("rsicd", "long_text"): PublishedSplit("RSICD-L", 1093, 1093),
}


@dataclass(frozen=True)
class RetrievalData:
    """Retrieval benchmark: `text_to_image[j]` is the index of the image that text j describes."""

    name: str  # as in the paper's tables where it is one of theirs
    images: ImageFiles  # M
    texts: list[str]  # N
    text_to_image: list[int]  # N
    read_from: str = ""  # file, columns, encoding
    expected: PublishedSplit | None = None
    skipped: tuple[str, ...] = ()  # images left out, with the reason

    @property
    def texts_hash(self) -> str:
        """SHA-256 over the texts and the images they belong to."""
        return json_sha256([self.texts, self.text_to_image])

    @property
    def summary(self) -> str:
        """Line on what was found, and what the published data would be."""
        line, expected = f"{self.name}: {len(self.images):,} images, {len(self.texts):,} texts", self.expected
        if self.is_whole:
            line += ", the whole test split"
        elif expected:
            line += f"; its test split has {expected.images:,} and {expected.texts:,}: {tables.NOT_COMPARABLE}"
        return f"{line}{tables.left_out(self.skipped)} ({self.read_from})"

    @property
    def is_whole(self) -> bool:
        """The numbers of images and texts are those of the published test split."""
        return bool(self.expected) and (len(self.images), len(self.texts)) == self.expected[1:]

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` says of the data."""
        expected = self.expected
        counts = {"images": expected.images, "texts": expected.texts} if expected else None
        return tables.describe_data(self, expected.name if expected else None, counts)


def find_sources(source: str | Path, text_column: str, columns: Mapping[str, str] | None = None) -> list[str]:
    """
    The benchmarks that a folder holds: itself where it has a caption file, else each folder below it that has one with
    the kind of text asked for; a `metadata.*`, `train.*` or tar counts where no folder below has such a file.

    Args:
        source, text_column, columns: as of [`load_retrieval`].

    Returns:
        Paths; anything that is no folder as it is.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or _caption_files(path, IN_A_FOLDER):
        return [str(source)]
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _caption_files(folder)]
    beside = _caption_files(path)
    if {*folders} <= {file.parent for file in beside}:  # data/train-*.parquet belongs to the folder itself
        return [str(source)]
    benchmarks = []
    for folder in folders:
        try:
            _read(folder, text_column, columns or {})
        except MissingColumn:
            continue
        benchmarks.append(str(folder))
    if not benchmarks and not beside:
        names = ", ".join(folder.name for folder in folders[:5])
        raise NotHere(f"none of the caption files in {path} ({names}) has a {text_column}.")
    return benchmarks or [str(source)]


def load_retrieval(
    source: str | Path, text_column: str, allow_missing: int = 0, columns: Mapping[str, str] | None = None
) -> RetrievalData:
    """
    Loads images and one kind of caption.

    Args:
        source: one of
            - a folder with `test.parquet` (as `evaluation.benchmarks.aerial_scenes` writes it) or shards of it, with
              `dataset_*.json`, `*_test.csv`, `test_caps.txt`, `test.*`, `captions.*`, `metadata.*`, `train.*` or tars;
            - a `.parquet`, `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv` or WebDataset `.tar` file with the columns `image` (or
              `filename`, `filepath`, `file_name`: a path, or the image itself) and `text_column`;
            - RSITMD's or RSICD's own `dataset_*.json`, whose `test` images are taken; RS5M's `rsitmd_test.csv`,
              `rsicd_test.csv`; AMFMN's `test_caps.txt` beside `test_filename.txt`;
            - the id of a Hub data set, whose `test` split is taken.
            Image paths start at the file's folder, or at the folder below it that holds most of them.
        text_column: `long_text` or `short_text`: a string, or a list of several captions of the image. Published
            files call the short one `title`, `caption`, `captions` or `sentences`.
        allow_missing: how many images may be missing or unreadable; they and their texts are left out, and named in
            `skipped`.
        columns: names in files of your own, by kind: `image`, `long`, `short`.

    Returns:
        [`RetrievalData`]: rows that name the same image become one image with several texts.

    Raises:
        `ValueError`: one sentence for a missing column, missing images, or empty captions, with their number and the
            first of them.
    """
    table = _read(source, text_column, columns or {})
    if not len(table):
        raise ValueError(f"{table.origin} has no rows.")
    captions = _captions(table, text_column)
    images, owners, beside = tables.table_images(table)
    kept, skipped = tables.usable_images(images, allow_missing, table.origin, beside)
    position_of = {image: position for position, image in enumerate(kept)}
    texts, text_to_image = [], []
    for captions_of_row, image in zip(captions, owners, strict=True):
        if image in position_of:
            texts.extend(captions_of_row)
            text_to_image.extend([position_of[image]] * len(captions_of_row))
    expected = _published_split(source, text_column)
    name = expected.name if expected else _name(source)
    read_from = f"{Path(table.origin).name}: {table.how}"
    return RetrievalData(name, images.take(kept), texts, text_to_image, read_from, expected, tuple(skipped))


def _name(source: str | Path) -> str:
    """`runs/scenes/test.parquet` and `runs/scenes` are both the data set `scenes`."""
    path = Path(source)
    if path.suffix in (*FORMATS, ".txt") and path.stem in ("test", "captions", "data", "test_caps"):
        return path.absolute().parent.name
    return path.stem if path.suffix in FORMATS else path.absolute().name


def _published_split(source: str | Path, text_column: str) -> PublishedSplit | None:
    """The benchmark that the file, its folder or the Hub id is named after."""
    path = Path(source)
    for part in (path.stem, path.absolute().parent.name if path.suffix else ""):
        for (benchmark, column), split in PUBLISHED_SPLITS.items():
            if benchmark in tables.plain(part) and column == text_column:
                return split
    return None


# ------------------------------------------------------------------------------------------------------------- reading


def _read(source: str | Path, text_column: str, named: Mapping[str, str]) -> Table:
    path = Path(source).expanduser()
    columns, image_columns = (
        (named[kind],) if (kind := column.removesuffix("_text")) in named else USUAL_COLUMNS[column]
        for column in (text_column, "image")
    )
    if path.is_dir():
        if files := _caption_files(path):
            if files[0].suffix == ".parquet":
                return tables.read_parquet(files, columns, image_columns)
            if files[0].suffix == ".tar":
                return _joined([tables.read_table(file, columns) for file in files])
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise ValueError(f"{path} holds several caption files ({names}); name one of them.")
            return _read_file(files[0], text_column, columns, image_columns)
        near = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix in FORMATS)[:5])
        raise NotHere(
            f"{path} holds no test.parquet, dataset_*.json, *_test.csv or captions.jsonl; name a "
            f"{', '.join(FORMATS)} file"
            + (f", for example one of: {near}." if near else " with the columns image, long_text, short_text.")
        )
    if path.is_file():
        return _read_file(path, text_column, columns, image_columns)
    if path.suffix in FORMATS or not tables.is_hub_id(str(source)):
        raise NotHere(f"{path} does not exist; give a folder, a {', '.join(FORMATS)} file or a Hub id.")
    return tables.read_hub(str(source), columns, image_columns=image_columns)


def _caption_files(folder: Path, patterns: Sequence[str] = (*IN_A_FOLDER, *OTHERWISE)) -> list[Path]:
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def _read_file(path: Path, text_column: str, columns: Sequence[str], image_columns: Sequence[str]) -> Table:
    if path.name.endswith("_caps.txt"):
        return _read_line_pairs(path, text_column)
    if path.suffix == ".json" and json_list_name(path) == "images":
        return _read_karpathy(path, list(read_rows(path)), text_column)
    return tables.read_table(path, columns, image_columns)


def _joined(shards: list[Table]) -> Table:
    """Shards of the same columns as one table."""
    columns = zip(*((shard.images, shard.values, shard.places) for shard in shards), strict=True)
    images, values, places = ([*itertools.chain(*parts)] for parts in columns)
    return dataclasses.replace(shards[0], images=images, values=values, places=places)


def _read_karpathy(path: Path, entries: list[Any], text_column: str) -> Table:
    """`{"images": [{"filename": …, "split": "test", "sentences": [{"raw": …}, …]}, …]}`."""
    column = "sentences" if text_column == "short_text" else text_column
    for number, entry in enumerate(entries, start=1):
        for name in ("filename", "split", "sentences"):
            if name not in entry:
                raise ValueError(f"{path}, image {number} has no {name}; each image needs filename, split, sentences.")
    chosen = [entry for entry in entries if entry["split"] == "test"]
    if not chosen:
        counts = Counter(entry["split"] for entry in entries)
        splits = ", ".join(f"{split}: {count}" for split, count in counts.items())
        raise ValueError(f"{path} has no image of split test; it has {splits or 'no images'}.")
    lacking = [entry["filename"] for entry in chosen if column not in entry]
    if lacking and len(lacking) < len(chosen):
        complain(lacking, len(chosen), f"test images of {path} have no {column}")
    if lacking:
        raise MissingColumn(
            f"{path} has short captions only (sentences); long-text retrieval needs a file with long_text for each "
            "image, such as RSITMD-L or RSICD-L."
        )
    images, values = [entry["filename"] for entry in chosen], [entry[column] for entry in chosen]
    return Table(str(path), images, values, path.parent, "test image", f"{column} of the images of split test")


def _read_line_pairs(path: Path, text_column: str) -> Table:
    """Captions line by line, and their images' names in the file beside: a name a caption, or a name every five."""
    if text_column != "short_text":
        raise MissingColumn(f"{path} has short captions only; long-text retrieval needs a file with long_text.")
    beside = path.with_name(path.name.replace("_caps.txt", "_filename.txt"))
    if not beside.is_file():
        raise ValueError(f"{path} needs {beside.name} beside it, with the images' names.")
    texts, names = (file.read_text(encoding=text_encoding(file)).rstrip("\n").split("\n") for file in (path, beside))
    each, rest = divmod(len(texts), max(len(names), 1))
    if not each or rest:
        counts = f"{len(texts)} captions, {beside.name} {len(names)} images"
        raise ValueError(f"{path} has {counts}: not a whole number each.")
    images = [name.strip() for name in names for _ in range(each)]
    captions = [text.rstrip("\r") for text in texts]
    return Table(str(path), images, captions, path.parent, "line", f"images of {beside.name}")


# ------------------------------------------------------------------------------------------------------------ checking


def _captions(table: Table, text_column: str) -> list[list[str]]:
    captions, empty, numbers = [], [], []
    for row, value in enumerate(table.values):
        texts = value if isinstance(value, list | tuple) else [value]
        # A sentence of Karpathy's files is an object.
        texts = [text.get("raw") if isinstance(text, dict) else text for text in texts]
        if any(isinstance(text, int | float) for text in texts):
            numbers.append(f"{table.position(row)} ({texts[0]})")
        elif not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            empty.append(table.position(row))
        captions.append(texts)
    complain(numbers, len(table), f"{table.row_name}s of {table.origin} have a number as {text_column}, not a text")
    complain(empty, len(table), f"{table.row_name}s of {table.origin} have no {text_column}, or an empty one")
    return captions
