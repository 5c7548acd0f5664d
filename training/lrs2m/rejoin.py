"""
Puts images back into a data set that was built without them (`images: omit`).

    python -m training.lrs2m.rejoin DIR --images FOLDER [FOLDER ...] --output DIR2

Each row's image is looked for under its key, `image_key`, below the folders, and else by its content: the SHA-256 of the
file that the captions were made on. Rows whose image is missing or another one are left out and listed in
`unmatched.jsonl`; rows that have their image keep it. A row's words and provenance do not change.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.encoding.imagery import is_image_file
from modeling_lrsclip.files.hashing import file_sha256

from .data_row import SPLITS, Row
from .output import WORK, Output, Progress, totals
from .shards import count_rows, read_manifest, read_rows
from .sources.images import Picture, Skip, read_picture


SHARD = (5000, 512 * 2**20)  # rows and bytes of a file, where the recipe does not say


class LocalImages:
    """
    Images below some folders, by name and by content.

    Args:
        folders: looked through in this order.
        search: hash every file when a key is not found, once; needed where files have other names than the source's.
    """

    def __init__(self, folders: Sequence[Path], search: bool = True):
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder} is not a folder; --images names folders with the images of the data set.")
        self.folders, self.search = list(folders), search

    def find(self, row: Row) -> Picture:
        """
        The image of a row.

        Raises:
            [`Skip`]: where it is not there, cannot be read, or is another image than the captions were made on.
        """
        other = None
        for path in self._named(row):
            picture = read_picture(path, 1)
            if picture.sha256 == row["image_sha256"]:
                return picture
            other = other or path
        if self.search and (path := self._by_hash.get(row["image_sha256"])):
            return read_picture(path, 1)
        if other:
            raise Skip("another image", f"{other} is not the file that the captions were made on")
        raise Skip("image missing", f"{row['image_key']} is below none of the folders")

    def _named(self, row: Row) -> Iterator[Path]:
        key = (row["image_key"] or "").replace("\\", "/")
        for folder in self.folders:
            tried = dict.fromkeys(folder / name for name in (key, Path(key).name) if name)
            for path in tried:
                inside = folder.resolve() in path.resolve().parents  # a key of a stranger's row stays in the folder
                if inside and path.is_file():
                    yield path

    @cached_property
    def _by_hash(self) -> dict[str, Path]:
        files = [path for folder in self.folders for path in sorted(folder.rglob("*"))]
        files = [path for path in files if is_image_file(path) and path.is_file()]
        progress = tqdm(reversed(files), "hashing images", len(files), unit=" images", leave=False, disable=None)
        return {file_sha256(path): path for path in progress}  # of equal ones the first


def rejoin(folder: Path, images: LocalImages, target: Path) -> dict[str, Any]:
    """
    Writes a data set with images into `target`, which must not exist or be empty, in the format of the one in `folder`.

    Args:
        folder: data set without images.
        images: finds an image by its hash.
        target: folder to write.

    Returns:
        The new manifest.

    Raises:
        `ValueError`: for an unfinished data set, a target that holds something, or when no image was found.
    """
    manifest = read_manifest(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists; give another --output.")
    target.mkdir(parents=True, exist_ok=True)
    recipe = manifest["recipe"]
    limits = tuple(recipe.get(name, default) for name, default in zip(("shard_rows", "shard_bytes"), SHARD))
    output = Output(target, manifest["format"], limits, Progress(manifest["recipe_hash"], command="rejoin"))
    rows = count_rows(manifest)
    for split, row in tqdm(read_rows(folder, manifest), total=rows, unit=" rows", disable=None, leave=False):
        _add(output, row, split, images)
    counts = totals(output.counts)
    if not counts.get("train", 0) + counts.get("validation", 0):
        output.close()
        shutil.rmtree(target)
        raise ValueError(f"none of the {rows} images of {folder} is below {', '.join(map(str, images.folders))}.")
    output.copy_lists(folder)  # what the first build left out stays known
    output.checkpoint(len(recipe["sources"]), 0)
    output.progress.counts = {
        source: {name: count for name, count in counts.items() if name not in SPLITS} | output.counts.get(source, {})
        for source, counts in manifest["counts"].items()
    }
    output.finish(manifest | {"images": "embed", "rejoined": True})
    shutil.rmtree(target / WORK)
    return read_manifest(target)


def _add(output: Output, row: Row, split: str, images: LocalImages) -> None:
    if row["image"] is None:
        try:
            picture = images.find(row)
        except Skip as error:
            entry = {"id": row["id"], "source": row["source"], "image_key": row["image_key"]}
            output.list_entry("unmatched", entry | {"reason": error.reason, "detail": str(error)})
            output.count(row["source"], f"unmatched {error.reason}")
            return
        row = row | {"image": {"bytes": picture.content, "path": f"{row['id']}{picture.suffix}"}}
    output.add(row, split)
    if output.full:
        output.checkpoint(0, 0)


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m training.lrs2m.rejoin", __doc__)
    parser.add_argument("folder", type=Path, help="a finished data set without images")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders that hold the images")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--by-name-only", action="store_true", help="do not hash files whose name is not a row's key")
    options = parser.parse_args(arguments)
    manifest = rejoin(options.folder, LocalImages(options.images, not options.by_name_only), options.output)
    left = {name: count for name, count in manifest["totals"].items() if name.startswith("unmatched ")}
    reasons = ", ".join(f"{name.removeprefix('unmatched ')} {count:,}" for name, count in left.items())
    print(
        f"{count_rows(manifest):,} rows with images in {os.fspath(options.output)}{f'; left out: {reasons}' if reasons else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
