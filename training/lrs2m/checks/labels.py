"""A caption against the labels of its image: classes denied, missing or invented, and counts. Exact, and free of charge."""

from collections.abc import Mapping, Sequence

from ..sources.anchors import Label, count_labels
from .candidate import Candidate, word_lists
from .classes import Mention, find_mentions, phrases_of, synonyms_of


SLACK = 0.25  # of a count, by which one that is said to be about may differ


def find_negated_class(candidate: Candidate) -> str | None:
    """A labelled class that the caption says is not there, and does not name otherwise."""
    named, denied = _named_and_denied(candidate.text, _names(candidate.labels))
    return _listed(denied - named)


def find_missing_class(candidate: Candidate) -> str | None:
    """Labelled classes that a long caption leaves out, where it names fewer of them than the recipe's `anchor_share`."""
    names = _names(candidate.labels)
    if candidate.which != "long" or not names:
        return None
    missing = set(names) - _named_and_denied(candidate.text, names)[0]
    return _listed(missing) if len(names) - len(missing) < candidate.limits.anchor_share * len(names) else None


def find_count(candidate: Candidate) -> str | None:
    """
    A number, in digits or words, that the labels do not bear out: more than there are, or fewer in all mentions of a class,
    each with a number. Labels without boxes say nothing of numbers.
    """
    counts = count_labels([label for label in candidate.labels if label.box])
    unboxed = {label.name for label in candidate.labels if not label.box}
    meant = phrases_of(tuple(counts), "heads")
    mentions = [mention for mention in find_mentions(candidate.text, meant) if not mention.negated]
    for mention in mentions:
        names = meant[mention.phrase]
        if mention.number and names.isdisjoint(unboxed):
            allowed = {counts[name] for name in names} | {sum(counts[name] for name in names)}
            same = [other for other in mentions if not names.isdisjoint(meant[other.phrase])]
            if _exceeds(mention, max(allowed)) or _falls_short(same, min(allowed)):
                return f"{mention.number} {mention.phrase}, labelled {max(allowed)}"
    return None


def find_excluded_class(candidate: Candidate) -> str | None:
    """A class of those that the labels would list if it were there, in a caption of an image without it."""
    return _listed(_invented(candidate.text, candidate.labels, candidate.classes)) if candidate.labels else None


def find_invented_landmark(candidate: Candidate) -> str | None:
    """A stadium, airport or the like that neither the labels nor the prompt knows of; labels may be incomplete."""
    if not any(label.box for label in candidate.labels):
        return None
    landmarks = tuple(word_lists()["landmarks"])
    invented = _invented(candidate.text, candidate.labels, landmarks)
    in_prompt = {mention.phrase for mention in find_mentions(candidate.filled_in, phrases_of(landmarks, "synonyms"))}
    return _listed({name for name in invented if synonyms_of(name).isdisjoint(in_prompt)})


def label_scores(text: str, labels: Sequence[Label], classes: Sequence[str]) -> tuple[float | None, float | None]:
    """
    Precision and recall of the classes that a caption names.

    Args:
        text: the caption.
        labels: of the image.
        classes: all that the labels would list; without them, well-known landmarks.

    Returns:
        Precision: of the classes named, the share that is labelled; None where none is named. Recall: of the labelled
        classes, the share that is named and not denied; None without labels.
    """
    names = _names(labels)
    if not names:
        return None, None
    named = _named_and_denied(text, names)[0]
    invented = _invented(text, labels, classes or word_lists()["landmarks"])
    precision = len(named) / (len(named) + len(invented)) if named or invented else None
    return precision, len(named) / len(names)


def _named_and_denied(text: str, names: Sequence[str]) -> tuple[set[str], set[str]]:
    meant = phrases_of(tuple(names), "related")
    named: set[str] = set()
    denied: set[str] = set()
    for mention in find_mentions(text, meant):
        (denied if mention.negated else named).update(meant[mention.phrase])
    return named, denied


def _invented(text: str, labels: Sequence[Label], classes: Sequence[str]) -> set[str]:
    """Classes that a text names and that no label can mean."""
    labelled = phrases_of(tuple(_names(labels)), "related")
    known = phrases_of(tuple(classes), "synonyms")
    both: Mapping[str, frozenset[str]] = {**known, **dict.fromkeys(labelled, frozenset())}
    keys = {mention.phrase for mention in find_mentions(text, both) if not mention.negated}
    return {name for phrase in keys for name in both[phrase]}


def _exceeds(mention: Mention, most: int) -> bool:
    slack = 0 if mention.exact or mention.number <= 3 else SLACK
    return most < mention.number * (1 - slack)


def _falls_short(mentions: Sequence[Mention], least: int) -> bool:
    if any(mention.number is None or mention.part or not mention.exact for mention in mentions):
        return False
    return sum(mention.number for mention in mentions) < least


def _names(labels: Sequence[Label]) -> list[str]:
    return list(dict.fromkeys(label.name for label in labels))


def _listed(names: set[str]) -> str | None:
    return ", ".join(sorted(names))[:120] or None
