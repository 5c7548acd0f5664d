"""
Recomputes the retrieval figures of this repository's model card and shows them beside the stored ones.

    python evaluate_checkpoint.py --data FOLDER

It needs the files beside it, torch, transformers and Pillow (pyarrow for parquet), and nothing else. What was measured
stands in results.json; FOLDER holds the same data: test.parquet or shards of it, dataset_*.json, *_test.csv, test.* or
captions.* (.jsonl, .json, .csv, .tsv); a file can be named too. Before any code of the repository runs, the files are
compared with SHA256SUMS.

Exit status: 0 all figures agree, 1 something differs (a figure, the weights, a file), 2 bad input.

M images, N texts, D width of the shared space.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recomputes the retrieval figures of a model card.")
    parser.add_argument("--data", required=True, type=Path, help="folder or file with the measured images and texts")
    parser.add_argument("--results", type=Path, help="stored figures (results.json beside this file)")
    parser.add_argument("--tolerance", type=float, default=0.5, help="largest difference, in percentage points (0.5)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts or images encoded at once (64)")
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")
    return parser.parse_args(arguments)


if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv):
    parse_arguments()  # prints and ends, without the seconds of imports that follow

import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402
from transformers.utils import logging  # noqa: E402


TASKS = {  # name in results.json -> columns that hold its texts, the first that is there
    "zcrl": ("long_text", "long_caption"),
    "zcrs": ("short_text", "title", "caption", "captions", "sentences"),
}
IMAGE_COLUMNS = ("image", "filename", "filepath", "file_name")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
IN_A_FOLDER = ("test.parquet", "test-*.parquet", "data/test-*.parquet", "dataset_*.json", "*_test.csv")
IN_A_FOLDER += tuple(f"{stem}{suffix}" for stem in ("test", "captions") for suffix in SUFFIXES)
KS = (1, 5, 10)
TIE = 2.0**-24  # scores no further apart are equal, as `modeling_lrsclip.encoding.ties` has it
SUMS = "SHA256SUMS"


class Differs(Exception):
    """The repository is not what was measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return evaluate(Path(__file__).absolute().parent, options)  # not resolved: the cache is all links
    except Differs as error:
        print(f"differs: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(f"error: {options.data} or the stored results lack a field {error}", file=sys.stderr)
    except (ValueError, OSError, ImportError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def evaluate(folder: Path, options: argparse.Namespace) -> int:
    print(f"files    {check_files(folder)}")
    stored = read_results(options.results or folder / "results.json", must_exist=options.results is not None)
    pairs_of = {task: pairs for task in TASKS if (pairs := read_pairs(options.data, task))}
    if not pairs_of:
        raise ValueError(f"{options.data} has no column of texts; name a file with image, long_text, short_text.")
    wanted = choose(stored, pairs_of, options.data) if stored else [(task, None) for task in pairs_of]

    encoder = Encoder(folder, options.device, options.batch_size, stored)
    print(f"weights  {encoder.check_weights(stored)}")
    gaps = []
    for task, result in wanted:
        pairs, known = pairs_of[task], stored_figures(result) if result else {}
        title = f"{task} on {result['dataset'] if result else options.data}"
        print(f"\n{title}: {len(pairs.images):,} images, {len(pairs.texts):,} texts")
        figures = encoder.measure(pairs, [point["tokens"] for point in (result or {}).get("curve", [])])
        gaps += show(figures, known)
    if not gaps:
        print("\nThere are no stored figures to compare these with.")
        return 0
    agree = max(gaps) <= options.tolerance
    print(f"\n{len(gaps)} figures compared, largest difference {max(gaps):.4f}, allowed {options.tolerance}: ", end="")
    print("all agree." if agree else "they do not agree.")
    return 0 if agree else 1


def show(figures: dict[str, float], known: dict[str, float]) -> list[float]:
    """Prints what was recomputed beside what is stored; returns the differences."""
    print(f"  {'':32}{'stored':>10}{'recomputed':>12}{'difference':>12}")
    for name, value in figures.items():
        both = f"{known[name]:10.2f}{value:12.2f}{value - known[name]:12.2f}" if name in known else f"{value:22.2f}"
        print(f"  {name:32}{both}")
    return [abs(value - known[name]) for name, value in figures.items() if name in known]


# ------------------------------------------------------------------------------------------------------- what is stored


def check_files(folder: Path) -> str:
    """
    Compares the files of the repository with its list of checksums.

    Raises:
        `Differs`: for files that are missing or altered; the client checks no more than sizes when it downloads.
    """
    if not (folder / SUMS).is_file():
        return f"there is no {SUMS} to compare them with"
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: known for known, name in (line.split("  ", 1) for line in lines)}
    if bad := [name for name, known in listed.items() if file_sha256(folder / name) != known]:
        raise Differs(
            f"{len(bad)} of {len(listed)} files are missing or not those of {SUMS}: {', '.join(bad[:5])}; download "
            "them again, and do not run the code beside them until they are equal."
        )
    return f"{len(listed)} as listed in {SUMS}"


def file_sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_results(path: Path, must_exist: bool) -> dict[str, Any] | None:
    if not path.is_file() and not must_exist:
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or not {"models", "results"} <= stored.keys():
        raise ValueError(f"{path} holds no models and results; give the results.json of evaluation.run.")
    return stored


def choose(stored: dict[str, Any], pairs_of: dict[str, "Pairs"], data: Path) -> list[tuple[str, dict[str, Any]]]:
    """
    The stored results that this data is the data of, recognised by its hashes; says which are left out and why.

    Args:
        stored: content of `results.json`.
        pairs_of: by task, the data's images and texts.
        data: where they were read, for what is said.

    Returns:
        Task and stored result of each that can be repeated.
    """
    chosen = []
    for result in stored["results"]:
        task, name = result["task"], f"{result['task']} on {result['dataset']}"
        if task not in TASKS:
            print(f"skipped  {name}: this script recomputes retrieval, evaluation.run all of it")
        elif task not in pairs_of:
            print(f"skipped  {name}: {data} has no {TASKS[task][0]}")
        elif any(getattr(pairs_of[task], name) != result[name] for name in ("texts_sha256", "images_sha256")):
            print(f"skipped  {name}: {data} holds other images or texts")
        else:
            chosen.append((task, result))
    if not chosen:
        measured = ", ".join(f"{each['task']} on {each['dataset']}" for each in stored["results"])
        raise ValueError(f"{data} is none of the data that was measured ({measured}); give that data with --data.")
    return chosen


def stored_figures(result: dict[str, Any]) -> dict[str, float]:
    figures = dict(result["metrics"])
    figures |= {"tokens a text, mean": result["tokens"]["mean"], "texts cut, %": 100 * result["share_truncated"]}
    for point in result.get("curve", []):
        figures |= {f"{name}, {point['tokens']} tokens": point[name] for name in point if name.endswith("_R@1")}
    return figures


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Pairs:
    """`text_to_image[j]` is the index of the image that text j describes."""

    images: list[Path | bytes]  # M
    texts: list[str]  # N
    text_to_image: list[int]  # N

    @cached_property
    def texts_sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.text_to_image]).encode()).hexdigest()

    @cached_property
    def images_sha256(self) -> str:
        digest = hashlib.sha256()
        for source in self.images:
            digest.update(hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).digest())
        return digest.hexdigest()


def read_pairs(source: Path, task: str) -> Pairs | None:
    """
    Images and one kind of text; rows that name the same image share it. None where there is no such text.

    Raises:
        `ValueError`: for data that cannot be read, or images that are missing.
    """
    files = [source] if source.is_file() else _data_files(source)
    rows = [row for file in files for row in _rows(file)]
    known, wanted = rows[0] if rows else (), (IMAGE_COLUMNS, TASKS[task])
    image_column, column = (next((name for name in names if name in known), None) for names in wanted)
    if column is None or image_column is None:
        return None
    folder = _image_folder(files[0].parent, [row[image_column] for row in rows])
    index_of: dict[Any, int] = {}
    images, texts, text_to_image = [], [], []
    for row in rows:
        key, image = _image(row[image_column], folder)
        if key not in index_of:
            index_of[key] = len(images)
            images.append(image)
        captions = row[column] if isinstance(row[column], list) else [row[column]]
        texts += [text["raw"] if isinstance(text, dict) else text for text in captions]
        text_to_image += [index_of[key]] * len(captions)
    if missing := [image for image in images if isinstance(image, Path) and not image.is_file()]:
        raise ValueError(f"{len(missing)} of {len(images)} images of {files[0]} are missing, first: {missing[0]}")
    return Pairs(images, texts, text_to_image)


def _data_files(folder: Path) -> list[Path]:
    for pattern in IN_A_FOLDER:
        if files := sorted(folder.glob(pattern)):
            if len(files) > 1 and files[0].suffix != ".parquet":
                raise ValueError(f"{folder} holds {', '.join(file.name for file in files)}; name one of them.")
            return files
    raise ValueError(f"{folder} does not exist or holds none of {', '.join(IN_A_FOLDER[:5])}, captions.jsonl, …")


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        columns = {*IMAGE_COLUMNS, *(name for names in TASKS.values() for name in names)}
        return parquet.read_table(path, columns=sorted(columns & set(parquet.read_schema(path).names))).to_pylist()
    text = _text(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.suffix == ".json":
        document = json.loads(text)
        if isinstance(document, dict):  # RSITMD, RSICD: every image with its split
            return [entry for entry in document["images"] if entry["split"] == "test"]
        return document
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is none of .parquet, {', '.join(SUFFIXES)}.")
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:  # RS5M's rsicd_test.csv
        return path.read_text(encoding="gb18030")


def _image_folder(folder: Path, values: list[Any]) -> Path:
    """Paths start at the file's folder, or at the folder below it that holds most of them."""
    paths = list(dict.fromkeys(value for value in values if isinstance(value, str)))[:200]
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if paths else []
    return max([folder, *below], key=lambda candidate: sum((candidate / path).is_file() for path in paths))


def _image(value: Any, folder: Path) -> tuple[Any, Path | bytes]:
    """A key that tells one image from another, and the file or its bytes."""
    value = {"bytes": value} if isinstance(value, bytes) else value
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if content is not None:
        return (path, hashlib.sha256(content).digest()), content
    if not isinstance(path, str) or not path:
        raise ValueError(f"a row has neither an image nor its path, but {value!r}")
    return folder / path, folder / path


# ------------------------------------------------------------------------------------------------------------ measuring


class Encoder:
    """The model of this repository, in float32, under autocast where it was measured so."""

    def __init__(self, folder: Path, device: str, batch_size: int, stored: dict[str, Any] | None):
        logging.disable_progress_bar()
        options = {"trust_remote_code": True, "local_files_only": True}
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no model; this script runs in a downloaded model repository.")
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, **options).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **options)
        self.batch_size = batch_size
        measured_in = {model.get("dtype") for model in stored["models"]} if stored else set()
        self.half = torch.bfloat16 if measured_in == {"bfloat16"} else None

    def check_weights(self, stored: dict[str, Any] | None) -> str:
        """
        Raises:
            `Differs`: for other weights than those that were measured.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        sha256 = digest.hexdigest()
        known = [model["weights_sha256"] for model in stored["models"]] if stored else []
        if known and sha256 not in known:
            raise Differs(f"these weights ({sha256[:12]}) are not those that were measured ({known[0][:12]}).")
        return f"{sha256[:12]}" + (", those that were measured" if known else "")

    def measure(self, pairs: Pairs, tokens_kept: Sequence[int]) -> dict[str, float]:
        """Figures by name, in percent but for the tokens; `tokens_kept` are the lengths of the stored curve."""
        lengths = self.processor.count_tokens(pairs.texts)
        positions = self.model.config.text_config.max_position_embeddings
        positions = min(positions, self.processor.tokenizer.model_max_length)
        rows = self.processor.encode_text(pairs.texts)
        images, texts = self.images(pairs.images), self.texts(rows, positions)
        figures = recall(images, texts, pairs.text_to_image)
        figures["tokens a text, mean"] = sum(lengths) / len(lengths)
        figures["texts cut, %"] = 100 * sum(length > positions for length in lengths) / len(lengths)
        for kept in tokens_kept:
            cut = texts if kept >= positions else self.texts(rows, kept)
            point = recall(images, cut, pairs.text_to_image)
            figures |= {f"{name}, {kept} tokens": value for name, value in point.items() if name.endswith("_R@1")}
        return figures

    def texts(self, rows: list[list[int]], kept: int) -> torch.Tensor:
        """(N, D) unit rows; token ids beyond `kept` are cut and end-of-text put back."""
        rows = [row if len(row) <= kept else row[: kept - 1] + row[-1:] for row in rows]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        embeds = torch.empty(len(rows), self.model.config.projection_dim)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            longest = len(rows[indices[0]])
            # What stands after the first end-of-text does not matter: the tower is causal and pools there.
            ids = torch.tensor([rows[index] + rows[index][-1:] * (longest - len(rows[index])) for index in indices])
            embeds[indices] = self._unit(self.model.get_text_features, ids)
        return embeds

    def images(self, sources: list[Path | bytes]) -> torch.Tensor:
        """(M, D) unit rows."""
        return torch.cat([self._unit(self.model.get_image_features, batch) for batch in self._pixels(sources)])

    def _pixels(self, sources: list[Path | bytes]) -> Iterator[torch.Tensor]:
        for start in range(0, len(sources), self.batch_size):
            batch = sources[start : start + self.batch_size]
            files = (io.BytesIO(source) if isinstance(source, bytes) else source for source in batch)
            batch = [ImageOps.exif_transpose(Image.open(file)) for file in files]
            yield self.processor(images=batch, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)

    def _unit(self, tower: Callable, inputs: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        cast = torch.autocast(device.type, dtype=self.half) if self.half else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            pooled = tower(inputs.to(device)).pooler_output
        return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()


def recall(images: torch.Tensor, texts: torch.Tensor, text_to_image: Sequence[int]) -> dict[str, float]:
    """
    Recall at 1, 5 and 10 in both directions and their mean, in percent. A wrong candidate with the score of the right
    one stands before it; an image's further texts never count against it.

    Args:
        images: (M, P) unit embeddings.
        texts: (N, P) unit embeddings.
        text_to_image: index of each text's image.

    Returns:
        Percent by metric.
    """
    image_of_text = torch.tensor(text_to_image)
    scores = texts.double() @ images.double().T  # (N, M)
    right = scores.gather(1, image_of_text[:, None])  # (N, 1)
    best = torch.full((len(images),), -torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, image_of_text, right[:, 0], "amax")  # (M,)
    scores.scatter_(1, image_of_text[:, None], -torch.inf)  # right pairs do not compete
    ranks = {"text_to_image": (scores >= right - TIE).sum(1), "image_to_text": (scores >= best - TIE).sum(0)}
    figures = {f"{way}_R@{k}": 100 * (each < k).sum().item() / len(each) for way, each in ranks.items() for k in KS}
    return figures | {"mR": sum(figures.values()) / len(figures)}


if __name__ == "__main__":
    sys.exit(main())
