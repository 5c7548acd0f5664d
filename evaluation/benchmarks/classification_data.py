"""
Images with a class each for zero-shot classification, from class folders, a table file or the Hub.

M images, C classes.
"""

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES, ImageFiles, is_image_file
from modeling_lrsclip.files.hashing import json_sha256
from modeling_lrsclip.files.tables import parquet_columns

from . import tables
from .class_names import Dataset, find_dataset, known_datasets, own_dataset
from .tables import FORMATS, SPLITS, NotHere, plain


LABEL_COLUMNS = ("label", "class_name", "labels", "class")
NO_NAMES = ("images", "imgs", "data", "captions", "2750", *SPLITS)  # folders and files that do not name a data set


@dataclass(frozen=True)
class ClassificationData:
    """Classification benchmark: `labels[i]` is the class of image i, an index into `dataset.classes`."""

    dataset: Dataset
    images: ImageFiles  # M
    labels: list[int]  # M
    read_from: str = ""  # folder or file, splits
    skipped: tuple[str, ...] = ()  # images left out, with the reason
    left_out: tuple[str, ...] = ()  # what is no image of a class, such as `3 files that are no images`

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def labels_hash(self) -> str:
        """SHA-256 over the classes and the images' labels."""
        return json_sha256([self.dataset.folders, self.labels])

    @property
    def absent(self) -> list[str]:
        """Classes without an image; they stay candidates, as the data set defines them."""
        present = set(self.labels)
        return [folder for index, folder in enumerate(self.dataset.folders) if index not in present]

    @property
    def is_whole(self) -> bool:
        """All images of a known data set are here."""
        return len(self.images) == self.dataset.images

    @property
    def summary(self) -> str:
        """Line on what was found, and what the published data would be."""
        dataset = self.dataset
        parts = [f"{len(self.images):,} images, {len(dataset.classes)} classes"]
        if dataset.images:
            other = f"the data set has {dataset.images:,}: {tables.NOT_COMPARABLE}"
            parts.append("the whole data set" if self.is_whole else other)
        if not dataset.key:
            shown = [f"{folder} = {wording!r}" for folder, wording in dataset.classes.items() if folder != wording]
            parts.append(f"class names derived from the folders' names ({', '.join(shown[:3]) or 'as they are'})")
        if self.absent:
            parts.append(f"no image of {len(self.absent)} classes ({', '.join(self.absent[:3])})")
        if self.skipped:
            parts.append(f"{len(self.skipped)} images left out, first: {self.skipped[0]}")
        return f"{self.name}: {'; '.join([*parts, *self.left_out])} ({self.read_from})"

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` says of the data."""
        dataset = self.dataset
        expected = {"images": dataset.images} if dataset.images else None
        return tables.describe_data(self, dataset.name if dataset.key else None, expected)


def find_sources(source: str | Path) -> list[str]:
    """
    The data sets that a folder holds: itself where it has class folders or parquet files with labels, else each folder
    below it that does. Anything that is no folder is returned as it is.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or _is_dataset(path):
        return [str(source)]
    datasets = [str(folder) for folder in _folders(path) if _is_dataset(folder)]
    if not datasets and not _class_folders(path):
        raise NotHere(
            f"{path} holds neither class folders with images ({', '.join(IMAGE_SUFFIXES)}), nor folders of that kind, "
            "nor parquet files with labels."
        )
    return datasets or [str(source)]


def _is_dataset(folder: Path) -> bool:
    """Whether a folder holds classes; one folder of images alone does not: retrieval benchmarks keep theirs in `images/`."""
    try:
        if any(set(LABEL_COLUMNS) & set(parquet_columns(file)) for file in _parquet_files(folder, None)[:1]):
            return True
    except ValueError:
        return True  # loading it says what is wrong
    classes = _class_folders(folder) or _nested_class_folders(folder, _detect(folder))
    return len({plain(class_folder.name) for class_folder in classes}) > 1


def load_classification(source: str | Path, allow_missing: int = 0) -> ClassificationData:
    """
    Loads images and their classes.

    Args:
        source: one of
            - a folder of class folders; folders named after splits (`train`, `test`, …) are merged, a folder that only
              wraps another (`UCMerced_LandUse/Images`) is seen through, and so are the groups of classes of a known
              data set (`RSI-CB256/woodland/forest`);
            - a folder of parquet files, or a `.parquet`, `.jsonl`, `.json`, `.csv` or `.tsv` file, with the columns
              `image` (or `filename`, …) and `label` or `class_name` (a name, or a number with `ClassLabel` names);
            - the id of a Hub data set, all splits of which are taken;
            - the name of a known data set (`eurosat`), which stands for its copy on the Hub;
            - `NAME=SOURCE`, where the source's own name does not say which known data set it is.
        allow_missing: how many images may be missing or unreadable; they are left out, and named in `skipped`.

    Returns:
        [`ClassificationData`]: of a known data set with all its classes as candidates; of any other with the classes
        found, their wording derived from the folders' names.

    Raises:
        `ValueError`: one sentence for a folder without classes, a class that the known data set does not have,
            missing images.
    """
    name, separator, path = str(source).partition("=")
    dataset = find_dataset(name) if separator else None
    source = path if dataset else str(source)
    if not dataset and not Path(source).expanduser().exists() and (dataset := find_dataset(source)) and dataset.hub:
        source = dataset.hub
    path = Path(source).expanduser()
    dataset = dataset or _detect(path)
    parquet = _parquet_files(path, dataset) if path.is_dir() else []
    content = _read_folders(path, dataset) if path.is_dir() and not parquet else _read_rows(source, dataset, parquet)
    dataset = dataset or own_dataset(_own_name(path), sorted(set(content.labels)))
    labels = _classes_of(content.labels, dataset, source)
    if len(dataset.classes) < 2:
        raise NotHere(f"{source} has one class only ({dataset.folders[0]}); two or more are needed to tell apart.")
    kept, skipped = tables.usable_images(content.images, allow_missing, source, content.beside)
    images, labels = content.images.take(kept), [labels[index] for index in kept]
    return ClassificationData(dataset, images, labels, content.how, tuple(skipped), content.left_out)


class _LabelledImages(NamedTuple):
    images: ImageFiles
    labels: list[str]  # folder names, or what the column says
    how: str
    left_out: tuple[str, ...] = ()
    beside: str = ""  # where image paths start, for errors


def _detect(path: Path) -> Dataset | None:
    """The known data set that a file or folder is named after."""
    if (path if path.is_dir() else path.parent).joinpath("scenes.json").is_file():
        return known_datasets()["aerial_scenes"]
    return find_dataset(_own_name(path))


def _own_name(path: Path) -> str:
    """`EuroSAT/2750`, `EuroSAT/test.parquet` and `eurosat.parquet` are named after EuroSAT."""
    path = path.absolute()
    name = path.stem if path.suffix in FORMATS else path.name
    return _own_name(path.parent) if plain(name) in NO_NAMES else name


def _classes_of(labels: Sequence[str], dataset: Dataset, source: str) -> list[int]:
    indices = {label: dataset.find_class(label) for label in set(labels)}
    unknown = sorted(label for label, index in indices.items() if index is None)
    if unknown:
        near = difflib.get_close_matches(unknown[0], dataset.folders, n=1)
        raise ValueError(
            f"{source}: class {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more have" if len(unknown) > 1 else " has")
            + f" no name in evaluation/benchmarks/classes/{dataset.key}.json ({dataset.name}, version "
            f"{dataset.version}), which has {', '.join(dataset.folders[:3])}, …"
            + (f" (is it {near[0]}?)" if near else "")
            + "; add it to `also` there, or name the folder otherwise if it is another data set."
        )
    return [indices[label] for label in labels]


# ------------------------------------------------------------------------------------------------------------- folders


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] not in "._")


def _image_paths(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_image_file(file))


def _class_folders(path: Path) -> list[Path]:
    """Folders with images directly in them: below the path, below its split folders, or below an only folder."""
    folders = _folders(path)
    if folders and all(plain(folder.name) in SPLITS for folder in folders):
        return [folder for split in folders for folder in _class_folders(split)]
    with_images = [folder for folder in folders if any(_image_paths(folder))]
    return _class_folders(folders[0]) if not with_images and len(folders) == 1 else with_images


def _nested_class_folders(path: Path, dataset: Dataset | None) -> list[Path]:
    """
    Folders of a known data set that are named after its classes, at any depth: RSI-CB and MillionAID sort their classes
    into groups of groups.
    """
    if dataset is None:
        return []
    below = (Path(parent) / name for parent, names, _ in os.walk(path) for name in names)
    named = (folder for folder in below if dataset.find_class(folder.name) is not None)
    return sorted(folder for folder in named if any(_image_paths(folder)))


def _read_folders(path: Path, dataset: Dataset | None) -> _LabelledImages:
    folders = _class_folders(path) or _nested_class_folders(path, dataset)
    if not folders:
        raise NotHere(f"{path} holds no class folders with images ({', '.join(IMAGE_SUFFIXES)}).")
    files = [(file, folder.name) for folder in folders for file in _image_paths(folder)]
    beside = (file for folder in folders for file in folder.iterdir() if file.is_file() and file.name[0] != ".")
    others = Counter(file.suffix or file.name for file in beside if not is_image_file(file))
    empty = [sibling.name for parent in {folder.parent for folder in folders} for sibling in _folders(parent)]
    empty = sorted(set(empty) - {folder.name for folder in folders})
    left_out = [f"{others.total()} files that are no images ({', '.join(sorted(others))})"] if others else []
    left_out += [f"folders without images: {', '.join(empty[:3])}"] if empty else []
    splits = sorted({folder.parent.name for folder in folders if plain(folder.parent.name) in SPLITS})
    how = f"{path.name}: class folders" + (f" of {' + '.join(splits)}" if splits else "")
    images = ImageFiles([file for file, _ in files], [str(file.relative_to(path)) for file, _ in files])
    return _LabelledImages(images, [label for _, label in files], how, tuple(left_out))


# ---------------------------------------------------------------------------------------------------------------- rows


def _parquet_files(folder: Path, dataset: Dataset | None) -> list[Path]:
    """`test.parquet`, `train-00000-of-00002.parquet` and the like, in the folder or in `data/` below it."""
    splits = ("test",) if dataset and dataset.splits == "test" else SPLITS
    for parent in (folder, folder / "data"):
        if files := [file for file in sorted(parent.glob("*.parquet")) if file.stem.split("-")[0].lower() in splits]:
            return files
    return []


def _read_rows(source: str, dataset: Dataset | None, parquet: list[Path]) -> _LabelledImages:
    path = Path(source).expanduser()
    if parquet:
        table = tables.read_parquet(parquet, LABEL_COLUMNS)
    elif path.is_file():
        table = tables.read_table(path, LABEL_COLUMNS)
    elif path.suffix in FORMATS or not tables.is_hub_id(source):
        raise NotHere(
            f"{source} does not exist; give a folder of class folders, a {', '.join(FORMATS)} file, a Hub id, or one "
            f"of {', '.join(key for key, known in known_datasets().items() if known.hub)}."
        )
    else:
        split = "test" if dataset and dataset.splits == "test" else None
        table = tables.read_hub(source, LABEL_COLUMNS, split)
    if not len(table):
        raise ValueError(f"{table.origin} has no rows.")
    labels = [_label(value, table.label_names) for value in table.values]
    odd = [table.position(row) for row, label in enumerate(labels) if not label]
    numbered = any(isinstance(value, int) for value in table.values) and not table.label_names
    advice = " (labels are numbers without names; add a column class_name, or store them as a ClassLabel of datasets)"
    what = f"{table.row_name}s of {table.origin} have no class name"
    tables.complain(odd, len(table), what, advice if numbered else "")
    # A copy of an image is an image of its own.
    images, owners, beside = tables.table_images(table, merge_embedded=False)
    label_of: dict[int, str] = {}
    for image, label in zip(owners, labels, strict=True):
        if label_of.setdefault(image, label) != label:
            raise ValueError(f"{table.origin} gives {images.names[image]} two classes, {label_of[image]} and {label}.")
    how = f"{Path(table.origin).name}: {table.how}"
    return _LabelledImages(images, [label_of[image] for image in range(len(images))], how, beside=beside)


def _label(value: Any, names: Sequence[str] | None) -> str | None:
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None  # -1 stands for no label
    return value if isinstance(value, str) else None
