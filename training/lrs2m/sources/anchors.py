"""Labels of an image as semantic anchors: how many of what and where (route 4; paper, appendix A)."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of width and height, from the upper left

_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")
_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NO_PLURAL = ("water", "grass", "vegetation", "forest", "land", "sand", "soil", "agriculture", "background")


@dataclass(frozen=True)
class Label:
    name: str  # with its attribute: "white plane"
    box: Box | None = None  # None: of the whole image


def position_of(box: Box) -> str:
    """Position of the middle of a box on a grid of three by three: `upper left` to `lower right`, `centre`."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row, column = (min(2, max(0, int(3 * share))) for share in (y, x))
    if row == 1:
        return "centre" if column == 1 else f"{_COLUMNS[column]} edge"
    return f"{_ROWS[row]} {'middle' if column == 1 else _COLUMNS[column]}"


def count_labels(labels: Sequence[Label]) -> dict[str, int]:
    """Labels by name, the most frequent first, equal ones by name."""
    return dict(sorted(Counter(label.name for label in labels).items(), key=lambda item: (-item[1], item[0])))


def anchor_text(labels: Sequence[Label], max_positions: int) -> str:
    """Labels as a captioner reads them: `3 white planes (upper left 2, centre), 1 runway (whole image)`."""
    parts = []
    for name, count in count_labels(labels).items():
        positions = Counter(position_of(label.box) for label in labels if label.name == name and label.box)
        most = positions.most_common(max_positions)
        named = [f"{position} {times}" if times > 1 else position for position, times in most]
        more = ["elsewhere"] if len(positions) > max_positions > 0 else []
        where = f" ({', '.join(named + more)})" if named else ""
        boxed = any(label.box for label in labels if label.name == name)
        parts.append(f"{count} {plural(name) if count > 1 else name}{where}" if boxed else name)
    return ", ".join(parts)


def labels_caption(labels: Sequence[Label]) -> str:
    """A sentence of the labels and their counts, for sources that have boxes and no caption; an own wording of what
    RemoteCLIP's box-to-caption rules do (Liu et al. 2024, Section III-B)."""
    counts = count_labels(labels)
    boxed = {label.name for label in labels if label.box}
    parts = [_counted(name, count) if name in boxed else name for name, count in counts.items()]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
    return f"An aerial image of {listed}."


def anchors_json(labels: Sequence[Label], sentence: str) -> str:
    """Labels as a row stores them: counts, objects with boxes as shares of width and height, the text a captioner read."""
    objects = [
        {"label": label.name, "position": position_of(label.box), "box": [round(edge, 4) for edge in label.box]}
        for label in labels
        if label.box
    ]
    return json.dumps({"counts": count_labels(labels), "objects": objects, "text": sentence}, ensure_ascii=False)


def plural(name: str) -> str:
    """The English plural of a label's last word by its ending."""
    if name.endswith(_NO_PLURAL) or not name:
        return name
    if re.search(r"(s|x|z|ch|sh)$", name):
        return name if name.endswith("s") and not name.endswith(("ss", "bus")) else name + "es"
    return re.sub(r"y$", "ies", name) if re.search(r"[^aeiou]y$", name) else name + "s"


def _counted(name: str, count: int) -> str:
    if count == 1:
        return name if name.endswith(_NO_PLURAL) else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {plural(name)}"
