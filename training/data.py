"""Images with a long and a short caption: from a file, a folder or the Hub to batches that every run can repeat."""

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch.nn.utils.rnn import pad_sequence

from modeling_lrsclip import LRSCLIPProcessor


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# What a folder's caption file may be called, the first found is read; {split} is data.train_split.
FOLDER_FILES = tuple(
    f"{stem}{suffix}"
    for stem in ("{split}", "captions", "metadata")
    for suffix in (".parquet", ".jsonl", ".json", ".csv")
)
_LISTED = 3  # offenders named in an error


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class DataConfig:
    train: str  # file (jsonl, json, csv, parquet), folder with one, or Hub data set
    train_split: str = "train"  # of a Hub data set or a folder
    validation: str | None = None  # likewise; recall on it picks the best model
    validation_split: str = "test"
    validation_pairs: int | None = Field(None, ge=1)  # only the first so many
    image_column: str = "image"  # a path (relative to the file) or the image itself
    long_column: str = "long_text"
    short_column: str = "short_text"
    shuffle_sentences: bool = False  # of the long text, anew at each visit
    workers: int = Field(0, ge=0)  # processes that read images


def load_pairs(source: str, split: str, config: DataConfig, columns: list[str]) -> Dataset:
    """
    Rows with an image and the caption `columns`; images stay undecoded bytes or paths until they are needed.

    Raises:
        `ValueError`: for a source that is neither file, folder nor Hub id, a missing column, an empty caption or a
            missing image file (counted, the first few named).
    """
    path = find_file(source, split)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{path} is not a caption file; its name must end in one of {', '.join(FORMATS)}.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        rows = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", **options)
    elif path.suffix in FORMATS or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{source} does not exist; give a caption file, a folder, or the id of a data set on the Hub."
        )
    else:
        rows = load_dataset(source, split=split)

    wanted = [config.image_column, *columns]
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}. "
            "Set data.image_column, data.long_column or data.short_column to the names used there."
        )
    rows = rows.select_columns(wanted)
    for column in columns:
        _refuse(
            source, f"rows with an empty {column}", [i for i, text in enumerate(rows[column]) if not _filled(text)]
        )
    if isinstance(rows.features[config.image_column], ImageFeature):
        return rows.cast_column(config.image_column, ImageFeature(decode=False))
    stored = rows[config.image_column]
    _refuse(source, "rows without an image path", [i for i, name in enumerate(stored) if not isinstance(name, str)])
    folder = path.parent
    files = [str(folder / name) for name in stored]
    _refuse(source, "images that do not exist", [name for name in files if not Path(name).is_file()])
    return rows.remove_columns(config.image_column).add_column(config.image_column, files)


def find_file(source: str, split: str) -> Path:
    """The caption file that `source` names; in a folder, the first of `FOLDER_FILES` that is there."""
    path = Path(source)
    if not path.is_dir():
        return path
    names = [name.format(split=split) for name in FOLDER_FILES]
    found = [path / name for name in names if (path / name).exists()]
    if not found:
        raise ValueError(f"The folder {source} holds no caption file; name it one of {', '.join(names)}.")
    return found[0]


def caption_list(stored: str | list[str]) -> list[str]:
    """A row's captions: a string is one, a list several."""
    return stored if isinstance(stored, list) else [stored]


def _filled(stored) -> bool:
    texts = caption_list(stored)
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def _refuse(source: str, what: str, offenders: list) -> None:
    if offenders:
        first = ", ".join(map(str, offenders[:_LISTED]))
        raise ValueError(f"{source} has {len(offenders)} {what}, the first: {first}; mend or remove them.")


def read_image(stored: str | dict) -> Image.Image:
    """An image from its path or from `{"bytes", "path"}`, turned upright by its EXIF tag; any PIL mode."""
    name = stored if isinstance(stored, str) else stored.get("path") or "an embedded image"
    try:
        source = (
            stored if isinstance(stored, str) else (io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])
        )
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image ({error}); replace it or remove its row.") from error


class CaptionedImages(torch.utils.data.Dataset):
    """
    Rows by (epoch, index), so that what is random about a visit depends on the two and the seed alone: not on the
    process, the worker, or where a run was resumed. With `short_from_long`, the short text is the long one's first
    sentence.
    """

    def __init__(self, rows: Dataset, config: DataConfig, seed: int, short_from_long: bool = False):
        self.rows, self.config, self.seed, self.short_from_long = rows, config, seed, short_from_long

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, visits: list[tuple[int, int]]) -> list[dict]:
        table = self.rows[[index for _, index in visits]]
        image, long, short = self.config.image_column, self.config.long_column, self.config.short_column
        items = []
        for position, (epoch, index) in enumerate(visits):
            rng = random.Random(f"{self.seed}/{epoch}/{index}")
            item = {"image": read_image(table[image][position])}
            if long in table:
                item["long_text"] = rng.choice(caption_list(table[long][position]))
                if self.short_from_long:
                    item["short_text"] = split_sentences(item["long_text"])[0]
                if self.config.shuffle_sentences:
                    item["long_text"] = shuffle_sentences(item["long_text"], rng)
            if short in table and not self.short_from_long:
                item["short_text"] = rng.choice(caption_list(table[short][position]))
            items.append(item)
        return items


def split_sentences(text: str) -> list[str]:
    """
    The sentences of `text`, each with its closing mark.

    DIFFERS: Long-CLIP (beichenzbc/Long-CLIP train/sharegpt4v.py) takes as the short text what stands before the first
    ". ": without the full stop, and going on past a question or exclamation mark or a line's end.
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """The sentences of `text` in another order."""
    sentences = split_sentences(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


class VisitSampler(torch.utils.data.Sampler):
    """
    For each step from `start` to `steps`, this process' share of the global batch as (epoch, index).

    The global batch of a step is a function of seed and step alone: rank r of W takes its r-th W-th part. Each epoch
    is a new permutation; what does not fill a batch at its end is left out.
    """

    def __init__(
        self, rows: int, batch_size: int, steps: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ):
        if batch_size > rows:
            raise ValueError(
                f"loop.batch_size={batch_size} is more than the {rows} training pairs; set it to {rows} or less."
            )
        if batch_size % world:
            raise ValueError(
                f"loop.batch_size={batch_size} is the batch of all processes together and must be a multiple of their "
                f"number, {world}."
            )
        self.rows, self.batch_size, self.steps, self.seed, self.start = rows, batch_size, steps, seed, start
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.rows // self.batch_size
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.rows, generator=generator).tolist()
            first = step % per_epoch * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size][self.share]]


class Collator:
    """Items to model inputs: `pixel_values` (B, 3, H, W), `input_ids` (B, L), `short_input_ids` (B, L_short)."""

    def __init__(self, processor: LRSCLIPProcessor):
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        images = self.processor.image_processor([item["image"] for item in items], return_tensors="pt")
        batch = {"pixel_values": images["pixel_values"]}
        for column, name in (("long_text", "input_ids"), ("short_text", "short_input_ids")):
            if column in items[0]:
                # No attention mask: what stands after end-of-text cannot reach it in a causal tower.
                ids = self.processor.encode_text([item[column] for item in items])
                batch[name] = pad_sequence(
                    [torch.tensor(row) for row in ids],
                    batch_first=True,
                    padding_value=self.processor.tokenizer.pad_token_id,
                )
        return batch
