"""
`geosearch index`: scenes to an index, resumable at any moment.

Blocks of windows are encoded one after the other and written as files below INDEX/blocks; a run that was killed finds
them there and goes on. When all are there, they are united into the parts of the index.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from modeling_lrsclip.encoding import Encoder, load_encoder
from modeling_lrsclip.files.atomic import PARTIAL
from modeling_lrsclip.files.locks import only_process
from modeling_lrsclip.published.registry import resolve

from .block_encoder import SKIPPED, check_skipped, encode_blocks, tell, write_skipped
from .index_store import METADATA, PARTS, IndexProblem, open_index
from .index_writer import finish_publishing, now, publish
from .plan import Plan, WindowOptions, make_plan
from .scenes import find_scenes
from .windows import WindowSize


BLOCKS, SHARDS, LOCK = "blocks", "shards", ".lock"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class IndexJob:
    """
    Arguments and steps of one `geosearch index` command.

    Attributes:
        scenes: files, folders, patterns, STAC documents, tables ([`~geosearch.scenes.find_scenes`]).
        output: folder of the index; made, or added to.
        model: folder, Hub id or checkpoint file; None: the one that the index was made with.
        options: fields of [`~geosearch.plan.WindowOptions`] that were given; the others are those of the index, or defaults.
        device: where the model runs, for example `cpu` or `cuda:0`; None: a GPU where there is one.
        dtype: of the towers: `float32`, `bfloat16`, `float16`; None: float16 on a GPU, float32 on a CPU.
        batch_size: windows encoded at once, at most.
        readers: threads that read ahead; None: by the number of cores.
        max_skipped: scenes that may be unreadable before the run stops.
        drop_missing: take out the windows of scenes that are no longer on disk.
        asset: key of the asset to take from STAC items.
        tokenizer: for a checkpoint file that comes without one.
    """

    scenes: Sequence[str]
    output: Path
    model: str | None = None
    options: dict[str, Any] | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 64
    readers: int | None = None
    max_skipped: int = 100
    drop_missing: bool = False
    asset: str | None = None
    tokenizer: str | None = None

    def load_encoder(self) -> Encoder:
        """The model, on its device."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or ("float16" if device.startswith("cuda") else "float32")
        model = self.model or self._metadata().get("model", {}).get("id")
        if model is None:
            raise ValueError(f"{self.output} is a new index: name the --model that its windows are encoded with.")
        options = {"batch_size": self.batch_size, "dtype": DTYPES[dtype]}
        return load_encoder(resolve(model), device, tokenizer=self.tokenizer, **options)

    def plan(self, encoder: Encoder) -> Plan:
        """
        Return what is to be done, compared with the index as it is.

        Raises:
            `ValueError`: for arguments that do not fit each other or the index.
        """
        index = self._metadata()
        scenes = find_scenes(self.scenes, self.asset)
        model = describe_model(encoder, self.tokenizer)
        options = self._options(index, encoder)
        if index:
            open_index(self.output).check_model(model["weights_sha256"])
            model = index["model"]
        plan = make_plan(scenes, options, model, index or None)
        plan.dropped = plan.gone if self.drop_missing else []
        return plan

    def _metadata(self) -> dict[str, Any]:
        return open_index(self.output).metadata if (self.output / METADATA).is_file() else {}

    def _options(self, index: dict[str, Any], encoder: Encoder) -> WindowOptions:
        named = {name: value for name, value in (self.options or {}).items() if value is not None}
        if not index:
            named.setdefault("sizes", (WindowSize(encoder.model.config.vision_config.image_size),))
            return WindowOptions(**named)
        known = WindowOptions.from_dict(index["windows"])
        asked = replace(known, **named)
        if asked != known:
            before, after = known.to_dict(), asked.to_dict()
            names = [name for name in before if before[name] != after[name]]
            differences = ", ".join(f"{name} {before[name]} and not {after[name]}" for name in names)
            advice = "leave the option out, or use another --output"
            raise IndexProblem(f"{self.output} was made with {differences}: {advice}.")
        return known


def describe_model(encoder: Encoder, tokenizer: str | None = None) -> dict[str, Any]:
    """Return what identifies a model in `index.json`; `tokenizer`: the one that was named beside it."""
    known = encoder.describe()
    described = {"id": _absolute(encoder.path), "weights_sha256": known["weights_sha256"]}
    described |= {"dimensions": encoder.model.config.projection_dim}
    described |= {name: known[name] for name in ("model_class", "image_processor", "dtype")}
    return described | ({"tokenizer": _absolute(tokenizer)} if tokenizer else {})


def _absolute(name: str) -> str:
    """A path that every folder understands; the name of something on the Hub as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def build_index(job: IndexJob) -> dict[str, Any]:
    """
    Does a whole `geosearch index` command in this process.

    Returns:
        Content of `index.json`, with `encoded`: windows encoded by this run, and `seconds` that took.

    Raises:
        `ValueError`: one sentence for what cannot be done; finished blocks stay for the next run.
    """
    with locked(job.output):
        finish_publishing(job.output)
        encoder = job.load_encoder()
        plan = job.plan(encoder)
        tell_plan(plan)
        check_skipped(plan.skipped, job.max_skipped, job.output)
        encoded = encode_blocks(plan, plan.blocks(), encoder, job.output / BLOCKS, job.readers, job.max_skipped)
        content = finish_index(job.output, plan, [job.output / BLOCKS])
        return {**content, **encoded}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Keeps other processes from writing into a folder; the system lets go when this one dies.

    Raises:
        `ValueError`: where another is writing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is not a folder: name another --output.") from error
    busy = f"{folder} is being written by another process: wait for it, or use another --output."
    with only_process(folder / LOCK, busy):
        for path in (*folder.glob(f".*.{PARTIAL}"), *folder.glob(".*.next")):  # of a process that was killed
            path.unlink(missing_ok=True)
        yield


def tell_plan(plan: Plan) -> None:
    """Print on standard error what was found."""
    windows = sum(scene.windows for scene in plan.scenes)
    new = len(plan.scenes) - len(plan.changed)
    counts = f"{new} new scenes, {len(plan.changed)} changed, {len(plan.sources) - len(plan.changed)} in the index"
    tell(f"{counts}: {windows:,} windows to encode")
    if plan.gone:
        fate = "are taken out" if plan.dropped else "stay in it (--drop-missing takes them out)"
        first = ", ".join(plan.gone[:3]) + (", ..." if len(plan.gone) > 3 else "")
        tell(f"{len(plan.gone)} scenes of the index are no longer on disk and {fate}: {first}")
    if plan.skipped:
        first = plan.skipped[0]["reason"]
        tell(f"{len(plan.skipped)} cannot be indexed and are named in {SKIPPED}; the first: {first}")
    if plan.coordinates == "pixels":
        tell("no scene has coordinates: places are told in pixels")


# -------------------------------------------------------------------------------------------------------- finishing


def finish_index(output: Path, plan: Plan, folders: Sequence[Path]) -> dict[str, Any]:
    """
    Unites encoded blocks with the index as it was, and takes the blocks away.

    Args:
        output: folder of the index.
        plan: all of whose blocks are there.
        folders: with the blocks' files.

    Returns:
        Content of `index.json`.

    Raises:
        `ValueError`: where no window came of any scene.
    """
    files = {}
    for scene, number in plan.blocks():
        name = scene.block_name(number)
        files[name] = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if missing := list(files.values()).count(None):
        raise ValueError(f"{missing} of {len(files)} blocks of {output} are not encoded: run geosearch index again.")
    before = open_index(output).metadata if (output / METADATA).is_file() else {}
    form = plan.model["weights_sha256"], plan.options.to_dict()
    if before and (before["model"]["weights_sha256"], before["windows"]) != form:
        raise IndexProblem(f"{output} holds windows of another model or form than these blocks: merge them elsewhere.")
    known = before.get("sources", {}).items()
    kept = {path: plan.sources.get(path, facts) for path, facts in known if path not in plan.dropped}
    sources, skipped = _collect(plan, files.values(), kept)
    write_skipped(output, skipped)
    if before and sources == before["sources"]:
        content = before
    else:
        if not any(facts["windows"] for facts in sources.values()):
            last = skipped[-1]["reason"]
            raise ValueError(f"no window of {len(plan.scenes)} scenes can be indexed; the last: {last}")
        parts = [output / PARTS / part["name"] for part in before.get("parts", [])]
        metadata = {**_metadata(plan, before), "sources": dict(sorted(sources.items()))}
        # Rows of scenes that were encoded come from their blocks alone.
        encoded = [path for path, facts in sources.items() if facts is not kept.get(path)]
        content = publish(output, [*parts, *files.values()], metadata, encoded)
    for folder in folders:
        if folder.is_relative_to(output):
            shutil.rmtree(folder, ignore_errors=True)
    return content


def _collect(plan: Plan, files: Iterable[Path], kept: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts of all sources by path, the `kept` ones included, and all that was skipped, from what the blocks say."""
    came: dict[str, dict[str, Any]] = {}
    for path in files:
        block = json.loads(pq.read_schema(path).metadata[b"block"])
        scene = came.setdefault(block["scene"], {"windows": 0, "empty": 0, "unreadable": 0})
        scene["windows"] += block["rows"]
        for name in ("empty", "unreadable"):
            scene[name] += block[name]
        for name in ("reason", "rendering", "sha256"):
            scene[name] = scene.get(name) or block[name]
    sources, skipped = dict(kept), list(plan.skipped)
    for scene in plan.scenes:
        facts, result = scene.facts, came[scene.facts.path]
        reason = result.pop("reason")
        if result["unreadable"]:
            skipped.append({"scene": facts.path, "reason": reason, "windows": result["unreadable"]})
            if not result["windows"]:
                continue  # tried again by the next run; of a scene that was fine before, the windows of then stay
        elif not result["windows"]:
            empty = f"more than {plan.options.max_empty:.0%} of every window is nothing"
            reason = f"{facts.path} holds too little: {empty}."
            skipped.append({"scene": facts.path, "reason": reason, "windows": result["empty"]})
        known = {name: getattr(facts, name) for name in ("width", "height", "crs", "gsd", "timestamp")}
        lists = {"files": [list(file) for file in facts.files], "transform": list(facts.transform)}
        sources[facts.path] = known | lists | result
    return sources, skipped


def _metadata(plan: Plan, before: dict[str, Any]) -> dict[str, Any]:
    moment = now()
    return {
        "created": before.get("created", moment),
        "updated": moment,
        "model": plan.model,
        "windows": plan.options.to_dict(),
        "coordinates": plan.coordinates,
        "preprocessing": {
            "format": "text",
            "expression": "bands to 8-bit RGB as in sources[scene].rendering; nothing filled with the window's mean "
            "colour; then the model's image processor",
        },
        "software": {name: version(name) for name in ("torch", "transformers", "rasterio", "pyarrow")},
    }
