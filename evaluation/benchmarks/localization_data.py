"""Large scenes with queries and the regions that each query describes, from a folder or a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.files.hashing import json_sha256
from modeling_lrsclip.files.tables import TableRow, iter_rows, json_list_name, parquet_columns, read_rows

from ..metrics.semantic_localization.measures import check_regions
from .tables import NOT_COMPARABLE, NotHere, describe_data, left_out, usable_images


AIR_SLT = "AIR-SLT"
AIR_SLT_COUNTS = {"images": 22, "texts": 59, "regions": 103}  # `test_data/annotations/anno.json` as published
AIR_SLT_FIELDS, OWN_FIELDS = ("jpg_name", "caption", "points"), ("image", "text", "polygons")
FILES = ("annotations/anno.json", "anno.json", "localization.jsonl", "localization.parquet")

Polygon = list[list[float]]  # corners (x, y) in pixels


@dataclass(frozen=True)
class LocalizationData:
    """Localization benchmark: query j is about image `text_to_image[j]`."""

    name: str
    images: ImageFiles  # M
    sizes: list[tuple[int, int]]  # M, height and width in pixels
    texts: list[str]  # Q
    text_to_image: list[int]  # Q
    regions: list[list[Polygon]]  # Q
    read_from: str = ""  # file
    expected: dict[str, int] = field(default_factory=dict)  # counts of the published data, where this is it
    skipped: list[str] = field(default_factory=list)  # images left out, with the reason

    @property
    def counts(self) -> dict[str, int]:
        sizes = (self.sizes[image] for image in self.text_to_image)
        in_scenes = [(polygon, size) for polygons, size in zip(self.regions, sizes) for polygon in polygons]
        over_the_edge = [any(not (0 <= x <= w and 0 <= y <= h) for x, y in polygon) for polygon, (h, w) in in_scenes]
        counts = {"images": len(self.images), "texts": len(self.texts), "regions": len(in_scenes)}
        return counts | {"regions_over_the_edge": sum(over_the_edge)}

    @property
    def is_whole(self) -> bool:
        """Whether the counts are those of the published data."""
        return bool(self.expected) and all(self.counts[name] == count for name, count in self.expected.items())

    @property
    def summary(self) -> str:
        """Line on what was found, and what the published data would be."""
        counts = self.counts
        line = f"{self.name}: {counts['images']:,} scenes, {counts['texts']:,} queries, {counts['regions']:,} regions"
        if self.is_whole:
            line += ", all of it"
        elif self.expected:
            line += "; it has {images}, {texts} and {regions}: ".format(**self.expected) + NOT_COMPARABLE
        if counts["regions_over_the_edge"]:
            line += f"; {counts['regions_over_the_edge']} regions reach over the edge of their scene"
        return f"{line}{left_out(self.skipped)} ({self.read_from})"

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` says of the data."""
        return describe_data(self, self.name if self.expected else None, self.expected or None)

    @property
    def queries_hash(self) -> str:
        """SHA-256 over the queries, their images and regions."""
        return json_sha256([self.texts, self.text_to_image, self.regions])


@dataclass(frozen=True)
class _Query:
    """A row as read; `where` words the errors."""

    image: Path | bytes
    image_name: str
    text: Any
    regions: Any
    where: str


def find_sources(source: str | Path) -> list[str]:
    """
    The benchmarks that a folder holds: itself where it has one of the files, else each folder below it that has one.
    Anything that is no folder is returned as it is.

    Raises:
        `NotHere`: for a folder without any.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or _files(path):
        return [str(source)]
    folders = [str(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _files(folder)]
    if not folders:
        raise NotHere(f"{path} holds none of {', '.join(FILES)}, nor does a folder in it.")
    return folders


def load_localization(source: str | Path, allow_missing: int = 0) -> LocalizationData:
    """
    Loads scenes, queries and regions.

    Args:
        source: one of
            - AIR-SLT as published (`xiaoyuan1996/SemanticLocalizationMetrics`, `test_data/`): the folder with
              `annotations/anno.json` and `imgs/`, or that JSON file;
            - a `.jsonl` file, one query a line: `{"image": path, "text": …, "polygons": [[[x, y], …], …]}`, paths
              relative to the file; or a folder with `localization.jsonl`;
            - a `.parquet` file with the columns `image` and `queries` (`text`, `polygons`), as
              `evaluation.benchmarks.aerial_scenes` writes it; or a folder with `localization.parquet`.
        allow_missing: how many images may be missing or unreadable; their queries are left out.

    Raises:
        `NotHere`: for a source that holds no data of this kind.
        `ValueError`: one sentence naming the file for missing images or fields, an empty text, and a region that is
            no polygon or lies outside its image.
    """
    path = _find(Path(source).expanduser())
    queries = _read(path)
    if not queries:
        raise ValueError(f"{path} has no queries.")
    index_of = {source: index for index, source in enumerate(dict.fromkeys(query.image for query in queries))}
    names = {query.image: query.image_name for query in queries}
    images = ImageFiles(list(index_of), [names[source] for source in index_of])
    kept, skipped = usable_images(images, allow_missing, str(path))
    images = images.take(kept)
    index_of = {source: index for index, source in enumerate(images.sources)}
    queries = [query for query in queries if query.image in index_of]
    sizes, owners, texts = images.sizes, [index_of[query.image] for query in queries], list(map(_text, queries))
    regions = [_regions(query, sizes[owner]) for query, owner in zip(queries, owners, strict=True)]
    name = path.absolute().parent.name if path.stem == "localization" else path.stem  # of scenes/localization.jsonl
    name, expected = (AIR_SLT, AIR_SLT_COUNTS) if path.suffix == ".json" else (name, {})
    return LocalizationData(name, images, sizes, texts, owners, regions, str(path), expected, skipped)


# -------------------------------------------------------------------------------------------------------------- reading


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).is_file()]


def _find(path: Path) -> Path:
    if path.is_dir():
        files = _files(path)
        if not files:
            raise NotHere(f"{path} holds none of {', '.join(FILES)}; one of them names scenes, queries and regions.")
        return files[0]
    if not path.is_file():
        raise NotHere(f"{path} does not exist; give a folder with one of {', '.join(FILES)}, or such a file.")
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise NotHere(f"{path}: {path.suffix or 'no suffix'} is not supported; use .json, .jsonl or .parquet.")
    return path


def _read(path: Path) -> list[_Query]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    fields, folder = OWN_FIELDS, path.parent
    if path.suffix == ".json":
        if json_list_name(path) != "":
            raise NotHere(f"{path} must hold a list of queries with {', '.join(AIR_SLT_FIELDS)}.")
        beside = [path.parent.parent / "imgs", path.parent / "imgs"]
        fields, folder = AIR_SLT_FIELDS, next((candidate for candidate in beside if candidate.is_dir()), path.parent)
    return [_query(row, fields, folder, path) for row in iter_rows(path)]


def _query(row: TableRow, fields: Sequence[str], folder: Path, path: Path) -> _Query:
    """A row of a JSON file; the first one shows whether the file is of this kind at all."""
    where, values = f"{path}, {row.where}", row.values
    if row.fault and "JSON" in row.fault:
        raise ValueError(f"{where} {row.fault}.")
    missing = [name for name in fields if name not in values]
    if missing:
        kind = NotHere if where.endswith(" 1") else ValueError
        raise kind(f"{where} has no {' and no '.join(missing)}; a query has the fields {', '.join(fields)}.")
    image, text, regions = (values[name] for name in fields)
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where}: {fields[0]} must be the path of an image, got {image!r:.60}.")
    return _Query(folder / Path(image).expanduser(), image, text, regions, where)


def _read_parquet(path: Path) -> list[_Query]:
    names = parquet_columns(path)
    if not {"image", "queries"} <= set(names):
        raise NotHere(f"{path} must have the columns image and queries; it has {', '.join(names) or 'none'}.")
    queries = []
    for number, row in enumerate(read_rows(path, columns=["image", "queries"]), start=1):
        image = row["image"] or {}
        source = image.get("bytes") or (path.parent / image["path"] if image.get("path") else None)
        where = f"{path}, row {number}"
        if source is None:
            raise ValueError(f"{where} has no image.")
        name = image.get("path") or f"{path.name}, row {number}"
        queries += [
            _Query(source, name, query["text"], query["polygons"], f"{where}, query {index}")
            for index, query in enumerate(row["queries"] or [], start=1)
        ]
    return queries


# ------------------------------------------------------------------------------------------------------------- checking


def _text(query: _Query) -> str:
    if not isinstance(query.text, str) or not query.text.strip():
        raise ValueError(f"{query.where} has an empty text, or none: {query.text!r:.60}.")
    return query.text.strip()


def _regions(query: _Query, size: tuple[int, int]) -> list[Polygon]:
    if not isinstance(query.regions, list | tuple):
        raise ValueError(f"{query.where}: the regions must be a list of polygons, got {query.regions!r:.60}.")
    try:
        return [polygon.tolist() for polygon in check_regions(query.regions, *size)]
    except ValueError as error:
        raise ValueError(f"{query.where}, image {query.image_name}: {error}") from error
