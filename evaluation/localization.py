"""
Semantic localization (SeLo, paper V-B 4): where in a large scene is what a text describes.

Shapes: H, W pixels of the scene, Q queries, N windows, D width of the shared space.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from modeling_lrsclip.encoding import Encoder
from modeling_lrsclip.encoding.model_inputs import share_truncated, token_lengths
from modeling_lrsclip.image_processing_lrsclip import to_rgb
from modeling_lrsclip.published.registry import PAPER_ONLY

from .benchmarks.localization_data import LocalizationData, find_sources, load_localization
from .benchmarks.tables import Unusable
from .localization_maps import Locator, Protocol, choose_protocol, query_embeddings
from .metrics.semantic_localization.measures import localization_metrics
from .paper import ARXIV, dataset_key, paper_figures, paper_tables
from .results import Aside, Column, Gap, Table, marked_name, seen_notes
from .retrieval import spread_evenly


__all__ = ["LocalizationTask", "localization_metrics", "localization_table", "similarity_map"]

MEASURES = ("Rsu", "Ras", "Rda", "Rmi")
EXAMPLE_SIDE = 64  # pixels of the longer side of a map that is kept for the figure


# ----------------------------------------------------------------------------------------------------------------- maps


def similarity_map(
    model: Any,
    processor: Any,
    image: Image.Image,
    texts: Sequence[str],
    protocol: str | Protocol = "v1",
    reference_io: bool = False,
    **options: Any,
) -> np.ndarray:
    """
    Maps of where a scene shows what each text describes, by the published procedure: similarity of a text to windows of
    the scene, averaged over each pixel, stretched to 0..255 and smoothed. The scene is encoded once for all texts.

    Args:
        model: `LRSCLIPModel` or `CLIPModel`.
        processor: the model's processor.
        image: PIL image of H x W pixels, at least as large as the largest window.
        texts (sequence of Q `str`).
        protocol: `v1` (Yuan et al. 2022, the paper's): windows of 256, 512 and 768 pixels, each size also half a window
            further on; `v2` (Yu et al. 2023): windows of 512, then smaller ones around the best 15 % of them for the
            text and four shuffles of its words; or a [`Protocol`] with other sizes.
        reference_io: windows and maps go through JPEG files, as in the published code.
        options: `batch_size`, `dtype`, `progress` of [`~modeling_lrsclip.encoding.Encoder`].

    Returns:
        (Q, H, W) uint8, 255 the highest probability: ready for [`localization_metrics`].

    Raises:
        `ValueError`: for a single string in place of texts, an unknown protocol, or a scene smaller than a window.
    """
    encoder, chosen = Encoder(model, processor, **options), choose_protocol(protocol)
    chosen.check_size(image.height, image.width)
    queries, _ = query_embeddings(encoder, texts, chosen)
    locator = Locator(encoder, chosen, reference_io)
    maps = list(locator.maps(_pixels(image), queries))
    return np.stack(maps) if maps else np.empty((0, image.height, image.width), np.uint8)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image))  # (H, W, 3)


# ----------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class LocalizationTask:
    """Semantic localization: loads scenes with queries, and measures a model on them."""

    protocol: str | Protocol = "v1"
    reference_io: bool = False  # as published: through JPEG; measured beside the figures without

    def find_sources(self, path: str) -> list[str]:
        return find_sources(path)

    def load(self, source: str, allow_missing: int = 0) -> LocalizationData:
        """Load by [`~benchmarks.localization_data.load_localization`]; `Unusable` also for a scene smaller than a window."""
        protocol, data = choose_protocol(self.protocol), load_localization(source, allow_missing)
        for name, size in zip(data.images.names, data.sizes, strict=True):
            try:
                protocol.check_size(*size)
            except ValueError as error:
                raise Unusable(f"image {name} of {source}: {error}") from error
        return data

    def evaluate(self, encoder: Encoder, data: LocalizationData) -> dict[str, Any]:
        """
        Measures one model.

        Returns:
            `dict`: ready for JSON: `metrics` (means over the queries, 0 to 1), `per_query`, `queries`, counts, `seconds`,
            `examples` (with small maps), …. With `reference_io`, `metrics` are those through JPEG, and
            `without_reference_io` and `reference_io_difference` stand beside them.
        """
        protocol = choose_protocol(self.protocol)
        queries, text_seconds = query_embeddings(encoder, data.texts, protocol)  # (Q, D)
        lengths = token_lengths(encoder.processor, data.texts)
        result = {
            **self._measure(encoder, data, queries, self.reference_io),
            "data": data.describe(),
            **data.counts,
            "protocol": protocol.name,
            "window_sizes": list(protocol.windows),
            "reference_io": self.reference_io,
            "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths)},
            "share_truncated": share_truncated(lengths, encoder.positions),
            "images_sha256": data.images.content_hash,
            "queries_sha256": data.queries_hash,
            "opencv": cv2.__version__,
        }
        result["seconds"]["texts"] = text_seconds
        if self.reference_io:
            plain = self._measure(encoder, data, queries, reference_io=False)
            result["without_reference_io"] = {name: plain[name] for name in ("metrics", "per_query")}
            without = plain["metrics"]
            result["reference_io_difference"] = {name: result["metrics"][name] - without[name] for name in without}
        return result

    def _measure(self, encoder: Encoder, data: LocalizationData, queries: Tensor, reference_io: bool) -> dict:
        started = time.perf_counter()
        locator = Locator(encoder, choose_protocol(self.protocol), reference_io)
        queries_of = defaultdict(list)  # by scene
        for query, image in enumerate(data.text_to_image):
            queries_of[image].append(query)
        shown = spread_evenly(len(data.texts))
        measured: dict[int, dict[str, float]] = {}
        small_maps: dict[int, list[list[int]]] = {}
        for image, in_scene in queries_of.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # scenes are large
                scene = _pixels(data.images[image])
            for query, heat in zip(in_scene, locator.maps(scene, queries[in_scene]), strict=True):
                measured[query] = localization_metrics(heat, data.regions[query])
                if query in shown:
                    small_maps[query] = _small(heat).tolist()
        per_query = {name: [measured[query][name] for query in range(len(data.texts))] for name in MEASURES}
        asked = zip(data.texts, data.text_to_image, strict=True)
        seconds = time.perf_counter() - started - locator.waited
        return {
            "metrics": {name: float(np.mean(values)) for name, values in per_query.items()},
            "per_query": per_query,
            "queries": [{"text": text, "image": data.images.names[image]} for text, image in asked],
            "windows": locator.windows,
            "seconds": {"windows": locator.seconds, "maps_and_metrics": seconds},
            "examples": [{"query": query, "map": small_maps[query]} for query in shown],
        }


def _small(heat: np.ndarray) -> np.ndarray:
    """A map made smaller, to at most `EXAMPLE_SIDE` pixels."""
    scale = min(1.0, EXAMPLE_SIDE / max(heat.shape))
    height, width = (max(1, round(side * scale)) for side in heat.shape)
    return cv2.resize(heat, (width, height), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------------------------- table


def localization_table(title: str, results: Sequence[dict[str, Any]]) -> Table:
    """
    Table with a row per model, as the paper's Table V; below it the paper's row and the gap, where there is one. On AIR-SLT the
    paper's rows of AMFMN, which is no CLIP, come last.
    """
    first = results[0]
    columns = [Column("model"), *(Column(name, "", 4, name != "Ras") for name in MEASURES)]
    counts = f"{first['images']:,} scenes, {first['texts']:,} queries"
    table = Table(f"{title} · {first['dataset']}: {counts}", columns)
    for result in results:
        table.rows.append([marked_name(result), *(result["metrics"][name] for name in MEASURES)])
        for name, kind in (("paper", Aside), ("gap", Gap)):
            if name in result:
                table.rows.append([f"  {name}", *(kind(result[name][measure]) for measure in MEASURES)])
        if "without_reference_io" in result:
            plain = result["without_reference_io"]["metrics"]
            table.rows.append(["  without JPEG", *(Aside(plain[name]) for name in MEASURES)])
    dataset = dataset_key("selo", first["dataset"])
    for model in PAPER_ONLY if first["data"]["whole"] else ():
        if figures := paper_figures(model, "selo", dataset):
            name = f"{paper_tables()['names'][model]} (paper)"
            table.rows.append([name, *(Aside(figures[measure]) for measure in MEASURES)])
    remarks = dict.fromkeys(text for result in results for text in result.get("remarks", []))
    notes = _notes(first, any("paper" in result for result in results))
    table.note = "\n".join([*notes, *remarks, *seen_notes(results)])
    return table


def _notes(result: dict[str, Any], beside_paper: bool) -> list[str]:
    sizes = "/".join(map(str, result["window_sizes"]))
    jpeg = ", windows and maps through JPEG as published" if result["reference_io"] else ""
    notes = [f"0 to 1; Ras: lower is better. Protocol {result['protocol']}, windows of {sizes} pixels{jpeg}."]
    if beside_paper:
        other = [] if result["protocol"] == "v1" else ["protocol v1"]
        other += [] if result["reference_io"] else ["JPEG in between (--reference-io)"]
        difference = f" The published loop is with {' and '.join(other)}." if other else ""
        notes.append(f"paper: as printed in {ARXIV}; gap: measured minus paper.{difference}")
    if result["data"]["skipped"] or (result["data"]["expected"] and not result["data"]["whole"]):
        notes.append(f"{result['data']['summary']}.")
    return notes
