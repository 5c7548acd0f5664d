"""
The card of a built data set (README.md), filled from its manifest and statistics.

    python -m training.lrs2m.card DIR

fills the template of `model_cards/`, measuring the statistics first where they are missing, and lists the sources'
licences in LICENSE.md, which the card links to. What somebody wrote or changed of the two is not replaced without
`--replace`.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.documents import without_markup
from modeling_lrsclip.files.hashing import bytes_sha256

from .output import DATA
from .shards import SUFFIXES, data_hash, read_manifest
from .statistics import PICTURES, SCORES, STATISTICS, false_captions, hand_read, write


CARD, LICENCES = "README.md", "LICENSE.md"  # the latter is what `license_link` on the Hub may name
TEMPLATE = Path(__file__).parents[2] / "model_cards" / "lrs2m_dataset_card_template.md"  # read as a file, not imported
ROUTES = {"merge": 1, "compress": 2, "expand": 3, "anchor": 4}
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_MARK = re.compile(r"\n<!-- made by training\.lrs2m\.card ([0-9a-f]{16}) -->\n*\Z")


def build_card(statistics: dict[str, Any], manifest: dict[str, Any], figures: Sequence[str] = ()) -> str:
    """
    The card of a data set.

    Args:
        statistics: of [`training.lrs2m.statistics`].
        manifest: of the build.
        figures: names of pictures beside the card.

    Returns:
        The card's text, its YAML head included.

    Raises:
        `ValueError`: for a source whose licence is not known, naming it.
    """
    unlicensed = [source["name"] for source in statistics["sources"] if not source["licence"].strip()]
    if unlicensed:
        raise ValueError(
            f"{len(unlicensed)} sources have no licence, first: {unlicensed[0]}; name it in the recipe and build again: "
            "nobody may use a data set whose terms are unknown."
        )
    recipe, metadata = _short(manifest["recipe"]), _metadata(statistics, manifest)
    statistics, manifest = without_markup(statistics), without_markup(manifest)  # what others wrote is plain text
    values = {
        **{name: statistics[name] for name in ("name", "rows", "images", "vocabulary")},
        **{name: statistics["left_out"][name] for name in ("failed", "skipped", "duplicates")},
        "sources": [_source(source) for source in statistics["sources"]],
        "long_mean_tokens": statistics["long"]["mean_tokens"],
        "short_mean_tokens": statistics["short"]["mean_tokens"],
        "over_77": 100 * statistics["long"]["over_77"],
        "over_248": 100 * statistics["long"]["over_248"],
        "evaluation_sets": statistics["evaluation_sets"] or None,
        "captioners": _captioners(manifest),
        "checked": false_captions(statistics["hand_read"]) if statistics.get("hand_read") else None,
        "checks": statistics.get("checks") or None,
        "scores": {SCORES[name]: one for name, one in statistics.get("scores", {}).items()} or None,
        "subsets": [source["paper"]["name"] for source in statistics["sources"] if "paper" in source],
        "figures": list(figures),
        "commands": ["python -m training.lrs2m.build --config recipe.yaml --output DIR"],
        "recipe": yaml.safe_dump(recipe, sort_keys=False, width=110).strip().replace("```", "'''"),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version),
    }
    known = {name: value for name, value in values.items() if value is not None}
    card = DatasetCard.from_template(DatasetCardData(), template_path=str(TEMPLATE), **known)
    card.data = metadata  # the template has a block of its own, which would stay
    return str(card)


def _metadata(statistics: dict[str, Any], manifest: dict[str, Any]) -> DatasetCardData:
    fixed = DatasetCard.load(TEMPLATE).data.to_dict()
    size = next((name for most, name in SIZES if statistics["rows"] < most), "n>10M")
    suffix = SUFFIXES[manifest["format"]]
    files = [
        {"split": split, "path": f"{DATA}/{split}-*{suffix}"} for split, rows in statistics["splits"].items() if rows
    ]
    described = {"pretty_name": statistics["name"], "size_categories": [size]}
    return DatasetCardData(**fixed | described, configs=[{"config_name": "default", "data_files": files}])


def _source(source: dict[str, Any]) -> dict[str, Any]:
    url = source.get("licence_url")
    return source | {
        "route": ROUTES[source["route"]],
        "pairs": source["rows"],
        "long_source": source["long_from"],
        "short_source": source["short_from"],
        "licence": source["licence"] + (f" ([terms]({url}))" if url else ""),
    }


def _captioners(manifest: dict[str, Any]) -> list[str]:
    captioners = {
        f"{captioner['model']} (temperature {captioner['temperature']:g}, top-p {captioner['top_p']:g})"
        for captioner in manifest["recipe"].get("captioners", {}).values()
    }
    return sorted(captioners) or ["none: all captions were given"]


def _short(value: Any) -> Any:
    """A recipe without what was left at nothing."""
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items() if one not in (None, {}, [])}
    return [_short(one) for one in value] if isinstance(value, list) else value


def write_card(folder: Path, replace: bool = False) -> Path:
    """
    Writes a data set's card and the list of its licences beside its manifest.

    Raises:
        `ValueError`: for an unfinished data set, a source without licence, or a README.md of somebody else's, unless
            it is to be replaced.
    """
    manifest = read_manifest(folder)
    path = folder / STATISTICS
    statistics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    current = {"data_sha256": data_hash(manifest), "hand_read": hand_read(folder, manifest)}
    if any(statistics.get(name) != value for name, value in current.items()):
        statistics = write(folder)  # of another build, or before somebody read it
    figures = [name for name in PICTURES if (folder / name).is_file()]
    card = build_card(statistics, manifest, figures)
    lines = ["# Licences of the sources", "", "Each row names its source and licence. No other licence is given.", ""]
    licences = [*lines, *(f"- {one['name']}: {_source(one)['licence']}" for one in statistics["sources"])]
    written = {folder / CARD: card, folder / LICENCES: "\n".join(licences)}
    for path, text in written.items():
        if path.is_file() and not replace and not is_own(path.read_text(encoding="utf-8")):
            if path.name == CARD:
                raise ValueError(
                    f"{path} was written or changed by somebody; add --replace, or keep it and leave this out."
                )
            continue
        path.write_text(f"{text.rstrip()}\n\n<!-- made by training.lrs2m.card {_digest(text)} -->\n", encoding="utf-8")
    return folder / CARD


def is_own(text: str) -> bool:
    """Tell whether a card is as [`write_card`] wrote it."""
    mark = _MARK.search(text)
    return bool(mark) and mark[1] == _digest(text[: mark.start()])


def _digest(card: str) -> str:
    return bytes_sha256(card.rstrip())[:16]


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m training.lrs2m.card", __doc__)
    parser.add_argument("folder", type=Path, help="a finished data set")
    parser.add_argument("--replace", action="store_true", help="replace a README.md that was changed by hand")
    options = parser.parse_args(arguments)
    print(f"written: {write_card(options.folder, options.replace)}")


if __name__ == "__main__":
    sys.exit(main())
