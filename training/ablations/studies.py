"""
The paper's ablations (V-D, Tables VI to IX, Figs. 7 to 10) and one of the curriculum that its second version names: what
the arms of each differ in, and what the paper finds.
"""

from dataclasses import dataclass, field
from typing import Any

from modeling_lrsclip.files.configuration import choose_names


TASKS = {"zcrl": "ZCRL mR", "zcrs": "ZCRS mR", "zic": "ZIC accuracy", "selo": "SeLo Rmi"}  # the columns of the paper
STRETCHED_CLIP, LONG_CLIP = "clip", "longclip"  # what an arm is fine-tuned from
LONG_CLIP_RANK = 32 / 512  # principal components of Long-CLIP's PCM, as a share of its embedding's width


@dataclass(frozen=True)
class Arm:
    """
    Setting of a study.

    Args:
        name: as the paper's table or figure writes it.
        fields: fields of the recipe, dotted, that this arm has otherwise.
        start: `STRETCHED_CLIP` or `LONG_CLIP`.
        size: of the model, where the study varies it.
        share: of the pairs that are trained on, each once, 0 to 1.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    start: str = STRETCHED_CLIP
    size: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Ordering:
    """A finding of the paper on a task: arm `better` is above arm `worse`, or, with `alike`, there is little between them."""

    task: str
    better: str
    worse: str
    alike: bool = False


@dataclass(frozen=True)
class Study:
    """Ablation of the paper. `figure` says that the paper plots it and prints no values."""

    name: str
    title: str
    axis: str  # what the arms' names are
    arms: tuple[Arm, ...]
    orderings: tuple[Ordering, ...]
    remark: str = ""  # what is held equal
    figure: bool = False


@dataclass(frozen=True)
class Ladders:
    """The values that a study's arms take; those of the paper, or smaller ones for smaller models."""

    batch_sizes: tuple[int, ...] = (64, 128, 256, 512)  # pairs a step; the last is the recipe's
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # of the pairs: the paper's 0.5, 1, 1.5 and 2 million
    long_weights: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9)  # tenths
    sizes: tuple[str, ...] = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
    pcm_rank: int = 32  # components


def _each(tasks: str, better: str, worse: str, alike: bool = False) -> tuple[Ordering, ...]:
    return tuple(Ordering(task, better, worse, alike) for task in tasks.split())


def pcm(ladders: Ladders) -> Study:
    arms = Arm("True", {"loss.pcm_rank": ladders.pcm_rank}), Arm("False", {"loss.pcm_rank": None})
    orderings = _each("zcrl", "True", "False") + _each("zcrs", "True", "False", alike=True)
    orderings += _each("zic selo", "False", "True")
    remark = f"PCM keeps {ladders.pcm_rank} components."
    return Study("pcm", "Influence of using PCM", "PCM", arms, orderings, remark)


def framework(ladders: Ladders) -> Study:
    short, long, both = "CLIP on LRS2M-S", "CLIP on LRS2M-L", "LRSCLIP on LRS2M"
    plain = {"model.stretch_ratio": 1}
    arms = Arm(short, plain | {"loss.long_weight": 0.0}), Arm(long, plain | {"loss.long_weight": 1.0}), Arm(both)
    orderings = _each("zcrl zcrs zic selo", long, short) + _each("zcrl zcrs zic selo", both, long)
    title = "CLIP on short or on long texts against LRSCLIP on both"
    remark = "The CLIPs read 77 tokens and are trained on the short (-S) or the long (-L) captions of the same images."
    return Study("framework", title, "method", arms, orderings, remark)


def short_text(ladders: Ladders) -> Study:
    first, short = "First Text", "Short Text"
    arms = Arm(first, {"loss.short_text": "first_sentence"}), Arm(short, {"loss.short_text": "own"})
    orderings = _each("zcrl", short, first, alike=True) + _each("zcrs zic selo", short, first)
    title = "First sentence of the long text against a short text of its own"
    remark = "First Text is the first sentence of the long caption."
    return Study("short_text", title, "short text", arms, orderings, remark)


def loss_weight(ladders: Ladders) -> Study:
    names = {tenths: f"{tenths}:{10 - tenths}" for tenths in ladders.long_weights}
    arms = tuple(Arm(name, {"loss.long_weight": tenths / 10}) for tenths, name in names.items())
    orderings = _each("zcrl zic", "8:2", "1:9")
    orderings += tuple(Ordering("zcrs", "8:2", name) for tenths, name in names.items() if tenths < 5)
    orderings += _each("zcrs", "8:2", "9:1")
    orderings += tuple(Ordering("selo", "5:5", name) for name in names.values() if name != "5:5")
    title, remark = "Weight of the long against the short texts' loss", "long : short, in tenths."
    return Study("loss_weight", title, "long : short", arms, orderings, remark, figure=True)


def curriculum(ladders: Ladders) -> Study:
    arms = [Arm(f"{weight:g}", {"loss.long_weight": weight}) for weight in (0.5, 0.8)]
    for start, end in ((0.98, 0.2), (0.2, 0.98)):
        arms.append(Arm(f"{start:g} to {end:g}", {"loss.long_weight": {"start": start, "end": end}}))
    title = "Constant weight of the long texts' loss against one that moves"
    remark = (
        "A weight that moves stands still for the first and the last fifth of the steps and follows half a cosine between. "
        "Version 2 of the paper trains with a curriculum whose schedule is not known to this project: a shape, not a "
        "reproduction, and nothing is assumed of which direction is better."
    )
    return Study("curriculum", title, "weight of long", tuple(arms), (), remark, figure=True)


def batch_size(ladders: Ladders) -> Study:
    names = [str(size) for size in ladders.batch_sizes]
    arms = tuple(Arm(name, {"loop.batch_size": int(name)}) for name in names)
    orderings = _each("zcrl zcrs zic selo", names[-1], names[0])
    remark = (
        "Every arm sees the same number of pairs, so that a smaller batch takes more steps, at the same learning rate."
    )
    return Study("batch_size", "Influence of batch size", "pairs a step", arms, orderings, remark, figure=True)


def subset_size(ladders: Ladders) -> Study:
    names = {share: f"{share:.0%}" for share in ladders.shares}
    arms = tuple(Arm(name, share=share) for share, name in names.items())
    whole = names[ladders.shares[-1]]
    smaller = [name for name in names.values() if name != whole]
    orderings = tuple(Ordering(task, whole, name) for task in ("zcrl", "zcrs", "selo") for name in smaller)
    orderings += _each("zic", whole, names[0.5], alike=True)
    title, axis = "Influence of the training set's size", "share of the pairs"
    remark = "One epoch each, as in Table X: an arm sees a random part of the pairs, each once, and takes as many steps less."
    return Study("subset_size", title, axis, arms, orderings, remark, figure=True)


def model_size(ladders: Ladders) -> Study:
    small, middle, large = ladders.sizes
    arms = tuple(Arm(size, size=size) for size in ladders.sizes)
    orderings = _each("zcrl zcrs zic selo", middle, small) + _each("zcrl zcrs zic selo", large, middle)
    return Study("model_size", "Influence of model size", "model", arms, orderings, figure=True)


def init(ladders: Ladders) -> Study:
    arms = Arm("Long-CLIP", start=LONG_CLIP), Arm("CLIP")
    orderings = _each("zcrl", "Long-CLIP", "CLIP") + _each("zcrs zic", "CLIP", "Long-CLIP")
    orderings += _each("selo", "CLIP", "Long-CLIP", alike=True)
    return Study("init", "Fine-tuning from Long-CLIP or from CLIP", "from", arms, orderings)


STUDIES = {
    make.__name__: make
    for make in (pcm, framework, short_text, loss_weight, batch_size, subset_size, model_size, init, curriculum)
}


def choose_studies(names: str, ladders: Ladders) -> list[Study]:
    """
    `pcm,init` or `all` -> studies, in the order given.

    Raises:
        `ValueError`: for an unknown name.
    """
    return [STUDIES[name](ladders) for name in choose_names(names, STUDIES, "study", "--study")]
