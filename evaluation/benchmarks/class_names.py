"""
Data sets for zero-shot classification with the wording of their classes, and prompt templates: versioned files in
`classes/`. Zero-shot accuracy hangs on both, so results name file and version.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.hashing import bytes_sha256

from .tables import plain


FOLDER = Path(__file__).parent / "classes"
WORDINGS = ("human", "folder")
PLACEHOLDERS = ("{class_name}", "{}")


@dataclass(frozen=True)
class Dataset:
    """A data set that is known by name: one file of `classes/`, or one of a user's own (`key` None)."""

    name: str  # as the paper prints it
    key: str | None  # the file's stem
    version: int | None
    classes: dict[str, str]  # folder name as distributed -> human wording
    also: dict[str, tuple[str, ...]]  # further spellings of a folder name
    images: int | None = None  # all of them, of every split
    splits: str = "all"  # or `test`: what is measured
    in_paper: bool = False  # a column of Table IV
    hub: str | None = None  # a copy on the Hub
    file_sha256: str | None = None
    aliases: tuple[str, ...] = ()  # further names of the data set

    @property
    def folders(self) -> list[str]:
        return list(self.classes)

    def wordings(self, wording: str = "human") -> list[str]:
        """
        The classes' names for prompts, in the order of `classes`.

        Args:
            wording: `human`, as in the file; or `folder`, the folder's name in lower case with `_` and `/` as spaces,
                `AnnualCrop` as `annualcrop`: the rule of om-ai-lab/RS5M `inference/inference_tool.py`.
        """
        if wording not in WORDINGS:
            raise ValueError(f"class names {wording!r} are not known; take {' or '.join(WORDINGS)}.")
        if wording == "human":
            return list(self.classes.values())
        return [re.sub("[_/]", " ", folder).lower() for folder in self.classes]

    def find_class(self, label: str) -> int | None:
        """Index of the class that a folder or label means, whatever its case and separators; None for none."""
        for index, (folder, wording) in enumerate(self.classes.items()):
            if plain(label) in map(plain, (folder, wording, *self.also.get(folder, ()))):
                return index
        return None

    def describe(self, wording: str) -> dict[str, Any]:
        """Return the fields that identify the names in `results.json`."""
        file = f"evaluation/benchmarks/classes/{self.key}.json" if self.key else None
        return {"file": file, "version": self.version, "sha256": self.file_sha256, "wording": wording}


@cache
def known_datasets() -> dict[str, Dataset]:
    """The data sets of `classes/` by key; those of the paper's Table IV first, in its order."""
    files = {path.stem: path for path in sorted(FOLDER.glob("*.json")) if path.stem != "templates"}
    order = ["resisc45", "eurosat", "patternnet", "whu_rs19", "optimal31", "rs_c11", "aid", "uc_merced"]
    order += ["skyscript", "fmow", "millionaid", "rsicb256", "rsicb128"]
    return {key: _read_dataset(files[key]) for key in sorted(files, key=lambda key: (order + [key]).index(key))}


def _read_dataset(path: Path) -> Dataset:
    content = path.read_bytes()
    fields = json.loads(content)
    also = {folder: tuple(spellings) for folder, spellings in fields["also"].items()}
    as_written = ("name", "version", "classes", "images", "splits", "in_paper", "hub", "aliases")
    plain_fields = {name: fields[name] for name in as_written}
    return Dataset(key=path.stem, also=also, file_sha256=bytes_sha256(content), **plain_fields)


@cache
def _datasets_by_name() -> dict[str, Dataset]:
    datasets = known_datasets().items()
    return {plain(name): known for key, known in datasets for name in (key, known.name, *known.aliases)}


def find_dataset(*names: str) -> Dataset | None:
    """Return the known data set that the first fitting name means, whatever its case and separators; None for none."""
    return next((known for name in names if (known := _datasets_by_name().get(plain(name)))), None)


def own_dataset(name: str, labels: Sequence[str]) -> Dataset:
    """A data set without a file: the wording is derived from the folders' names."""
    folders = {plain(label): label for label in sorted(labels, reverse=True)}  # of equal spellings the first
    return Dataset(name, None, None, {label: derive_wording(label) for label in sorted(folders.values())}, {})


def derive_wording(folder: str) -> str:
    """`BaseballField`, `baseball_field` and `baseball-field` -> `baseball field`; `parkinglot` stays one word."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", folder)
    return " ".join(re.sub(r"[\W_]+", " ", words).split()).lower()


# ----------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Templates:
    """Sentences with a place for the class name; `{class_name}` or `{}`."""

    name: str
    version: int | None  # of `classes/templates.json`
    templates: tuple[str, ...]

    def fill(self, class_name: str) -> list[str]:
        """The prompts of one class."""
        return [template.replace("{class_name}", class_name).replace("{}", class_name) for template in self.templates]


def load_templates(name: str = "paper") -> Templates:
    """
    A template set.

    Args:
        name: a set of `classes/templates.json`, or the path of a text file with one template a line.

    Raises:
        `ValueError`: for a name that is neither, a file without templates, a template without a place for the name.
    """
    document = json.loads((FOLDER / "templates.json").read_bytes())
    if name in document["sets"]:
        return Templates(name, document["version"], tuple(document["sets"][name]["templates"]))
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, document["sets"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"templates {name!r} are neither a file nor one of {', '.join(document['sets'])}.{hint}")
    templates = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    if not templates:
        raise ValueError(f"{path} holds no templates; write one a line, such as: a satellite photo of {{class_name}}")
    for number, template in enumerate(templates, start=1):
        if not any(placeholder in template for placeholder in PLACEHOLDERS):
            raise ValueError(f"{path}, template {number} ({template!r:.60}) has no {{class_name}}.")
    return Templates(path.name, None, templates)
