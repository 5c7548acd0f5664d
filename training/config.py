"""
A run's configuration: a dataclass a section, checked before anything loads. Nothing that is slow to import is imported
here, so that `--help` and a mistyped field are answered at once.
"""

import copy
import difflib
import math
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic.dataclasses import dataclass


SCRATCH = "scratch"
# Linear layers that take low-rank adapters, of each layer of either tower, by module names of transformers' CLIP.
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGETS = (*ATTENTION, "fc1", "fc2", "visual_projection", "text_projection")
COLUMNS = ("image", "long", "short")  # kinds of them
# Packages of which one makes a tracker available.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class SourceConfig:
    path: str  # file, folder, glob, {000..127} or {a,b} pattern, or Hub data set
    split: str | None = None  # by default data.train_split (of validation data, data.validation_split)
    weight: float | None = Field(None, gt=0)  # share of the visits beside the other sources'; all have one or none
    columns: dict[str, str] = Field(default_factory=dict)  # of image, long, short, where named unlike data.*_column

    def __post_init__(self):
        unknown = [kind for kind in self.columns if kind not in COLUMNS]
        if unknown:
            raise ValueError(f"columns of {self.path} names {', '.join(unknown)}; it may name {', '.join(COLUMNS)}")


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class DataConfig:
    train: str | list[SourceConfig]  # file (jsonl, json, csv, parquet, tar), pattern, folder, Hub data set, or several
    train_split: str = "train"  # of a Hub data set or a folder
    # Likewise, or the share of the training images that is held out, such as 0.1; recall on it picks the best model.
    validation: float | str | list[SourceConfig] | None = None
    validation_split: str = "test"
    validation_pairs: int | None = Field(None, ge=1)  # only the first so many
    image_column: str = "image"  # a path (relative to the file) or the image itself
    long_column: str = "long_text"
    short_column: str = "short_text"
    streaming: bool = False  # read rows when they are due instead of preparing and checking all of them first
    shuffle_buffer: int = Field(10_000, ge=1)  # rows shuffled together when streaming
    shuffle_sentences: bool = False  # of the long text, anew at each visit
    # Random views; captions that name left, right or north then become wrong.
    augment: Literal["none", "flips", "rotations", "dihedral"] = "none"
    # JPEGs are decoded at 1/2, 1/4 or 1/8 down to so many times the model's size; None: all of them.
    jpeg_margin: float | None = Field(1.0, ge=1)
    max_skipped_fraction: float = Field(0.01, ge=0, le=1)  # of the rows visited, which could not be used
    # Processes that read images; None: on a GPU as many as there are cores, up to 8.
    workers: int | None = Field(None, ge=0)
    prefetch_factor: int = Field(2, ge=1)  # batches each of them prepares ahead

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        if not value:
            raise ValueError("a list of sources needs at least one, for example [{path: tiles/captions.jsonl}]")
        sources = [source if isinstance(source, (dict, SourceConfig)) else {"path": source} for source in value]
        try:
            sources = TypeAdapter(list[SourceConfig]).validate_python(sources)
        except ValidationError as error:
            raise ValueError("; ".join(_explain(mistake) for mistake in error.errors())) from None
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("either all sources have a weight or none has")
        return sources

    @field_validator("validation", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if type(value) is int and value not in (0, 1):
            return str(value)  # a folder of this name
        if isinstance(value, (int, float)) and not 0 < value < 1:
            raise ValueError(f"a share of the training images lies between 0 and 1, as 0.1 does; {value} does not")
        return value

    @property
    def share(self) -> float | None:
        """The share of the training images that is held out; None where held-out data are named, or none."""
        return self.validation if isinstance(self.validation, float) else None

    def paths(self) -> list[str]:
        """Names of the training sources."""
        return [self.train] if isinstance(self.train, str) else [source.path for source in self.train]

    def columns(self, kinds: Sequence[str]) -> dict[str, str]:
        """Column names by kind ("image", "long", "short"), where a source does not name its own."""
        return {kind: getattr(self, f"{kind}_column") for kind in kinds}


def _explain(mistake: Any) -> str:
    number, *field = mistake["loc"]
    if mistake["type"] == "unexpected_keyword_argument":
        known = ", ".join(SourceConfig.__pydantic_fields__)
        return f"source {number} has an unknown field {field[0]}; it may have {known}"
    where = "".join(f" {name}" for name in field)
    return f"source {number}{where}: {mistake['msg'].removeprefix('Value error, ')}"


@dataclass(config=ConfigDict(extra="forbid"))
class LoRAConfig:
    rank: int = Field(16, ge=1)  # of each adapter
    alpha: float = Field(32.0, gt=0)  # the adapter's part is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapters' inputs
    targets: list[str] = Field(default_factory=lambda: list(ATTENTION))  # module names, among TARGETS

    def __post_init__(self):
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"model.lora.targets names {', '.join(unknown)}; choose among {', '.join(TARGETS)}")
        if not self.targets:
            raise ValueError(
                f"model.lora.targets is empty; choose among {', '.join(TARGETS)}, or leave model.lora out"
            )


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class ModelConfig:
    # Hub id, folder or published checkpoint file of a CLIP, Long-CLIP or LRSCLIP, its name (clip, longclip, lrsclip,
    # clip-vit-l-14, long-clip-vit-l-14, remoteclip-vit-l-14, ...), or "scratch"; one of 77 positions is stretched
    init: str = "openai/clip-vit-base-patch16"
    preset: str | None = None  # of a checkpoint file that does not say how it computes, see modeling_lrsclip.convert
    activation: str | None = None  # likewise
    kept_positions: int = Field(20, ge=0)  # stretching a CLIP: first rows kept ...
    stretch_ratio: int = Field(4, ge=1)  # ... and rows for each later one; 1 leaves 77 positions
    freeze_kept_positions: bool = True  # keep those rows bit-equal while training
    tokenizer: str | None = None  # Hub id, folder, BPE file; by default init's; "train": a BPE from the captions
    vocab_size: int = Field(1000, ge=514)  # of a tokenizer trained here
    text: dict[str, Any] = Field(default_factory=dict)  # scratch: fields of LRSCLIPTextConfig
    vision: dict[str, Any] = Field(default_factory=dict)  # scratch: fields of LRSCLIPVisionConfig
    projection_dim: int = Field(512, ge=1)  # scratch
    initial_logit_scale: float | None = Field(None, gt=0, le=100)  # 1 / tau to start from; by default init's
    attn_implementation: str | None = None  # eager, sdpa, flash_attention_2; by default what transformers picks
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None  # train low-rank adapters instead of the weights

    def __post_init__(self):
        from modeling_lrsclip import LRSCLIPTextConfig, LRSCLIPVisionConfig  # seconds of imports
        from modeling_lrsclip.published.checkpoints import ACTIVATIONS, PRESETS

        for name, choices in (("preset", PRESETS), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"model.{name} is {value}; choose among {', '.join(choices)}")
        if self.lora and self.init == SCRATCH:
            raise ValueError("model.lora adapts trained weights and model.init is scratch; leave one of them out")
        for section, config_class in ((self.text, LRSCLIPTextConfig), (self.vision, LRSCLIPVisionConfig)):
            known = {field.name for field in fields(config_class)}
            for name in section:
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{name} is not a field of {config_class.__name__}; did you mean {nearest}?")


@dataclass(config=ConfigDict(extra="forbid"))
class Curriculum:
    """
    A weight of the long texts that moves during the run: `start` for a share of the steps, then along half a cosine to
    `end`, where it stays.

    Version 2 of the paper trains with a curriculum over the two losses (DGCL). Its schedule is not known to this
    project, so this is a shape of that kind, not a reproduction.
    """

    start: float = Field(0.98, ge=0, le=1)  # mostly long texts at first
    end: float = Field(0.2, ge=0, le=1)
    start_share: float = Field(0.2, ge=0, le=1)  # of the steps, at the weight `start`
    end_share: float = Field(0.2, ge=0, le=1)  # of the steps, at the weight `end`

    def __post_init__(self):
        if self.start_share + self.end_share > 1:
            raise ValueError(
                f"loss.long_weight.start_share and end_share are {self.start_share:g} and {self.end_share:g}, together "
                "more than the whole run; they may sum to 1 at most"
            )

    def at(self, share: float) -> float:
        """Return the weight where `share`, from 0 to 1, of the steps is done."""
        if share < self.start_share:
            return self.start
        if share >= 1 - self.end_share:
            return self.end
        moved = (share - self.start_share) / (1 - self.start_share - self.end_share)
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * moved)) / 2


# In parentheses: names of the alternatives, which messages about a field leave out.
LongWeight = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("(constant)")] | Annotated[Curriculum, Tag("(curriculum)")],
    Discriminator(lambda value: "(curriculum)" if isinstance(value, dict | Curriculum) else "(constant)"),
]


@dataclass(config=ConfigDict(extra="forbid"))
class LossConfig:
    # omega of eq. (5): 1 trains on long texts only, 0 on short ones only; or a Curriculum: start, end, their shares
    long_weight: LongWeight = 0.8
    pcm_rank: int | None = Field(None, ge=1)  # match short texts to so many principal components; 32 in Long-CLIP
    short_text: Literal["own", "first_sentence"] = "own"  # first_sentence: of the long text (ablation 6)
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # 0.1 in Long-CLIP
    mask_identical_captions: bool = False  # captions equal to a pair's own are not its negatives
    chunk_size: int | None = Field(None, ge=1)  # rows of the B x B logits held at a time; None: all

    @property
    def kinds(self) -> list[str]:
        """
        Texts that the loss weighs, "long" and "short": with a weight of 0 or 1 the other one is not even read, nor is the
        short one where the long text's first sentence stands for it.
        """
        least, most = self._range
        return ["long"] * (most > 0) + ["short"] * (least < 1 and self.short_text == "own")

    @property
    def _range(self) -> tuple[float, float]:
        """The smallest and the largest weight of the long texts during the run."""
        weight = self.long_weight
        both = (weight.start, weight.end) if isinstance(weight, Curriculum) else (weight, weight)
        return min(both), max(both)

    def at(self, share: float) -> "LossConfig":
        """
        Return the loss with the constant weight of one moment of the run.

        Args:
            share: of the steps that are done, from 0 to 1.
        """
        if not isinstance(self.long_weight, Curriculum):
            return self
        now = copy.copy(self)
        now.long_weight = self.long_weight.at(share)
        return now

    def __post_init__(self):
        least, most = self._range
        if self.short_text == "first_sentence" and least == most and least in (0, 1):
            raise ValueError(
                f"loss.short_text is first_sentence and loss.long_weight is {least:g}, which leaves one of "
                "the two texts out; set a weight between 0 and 1, or short_text to own"
            )


@dataclass(config=ConfigDict(extra="forbid"))
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"  # Table X
    learning_rate: float = Field(3e-4, gt=0)  # peak
    momentum: float = Field(0.9, ge=0, lt=1)  # SGD
    dampening: float = Field(0.1, ge=0, lt=1)  # SGD
    beta1: float = Field(0.9, ge=0, lt=1)  # AdamW
    beta2: float = Field(0.999, ge=0, lt=1)  # AdamW
    eps: float = Field(1e-8, gt=0)  # AdamW
    weight_decay: float = Field(0.0, ge=0)  # matrices only, see build_optimizer
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # linear from 0
    max_grad_norm: float | None = Field(None, gt=0)  # clip to this norm


@dataclass(config=ConfigDict(extra="forbid"))
class PushConfig:
    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")  # owner/name on the Hub; made if it does not exist
    private: bool = False  # if it is made now
    every: Literal["end", "validation"] = "end"  # validation: also each new best model, when it is found
    license: str | None = None  # of the weights, as the Hub spells it; by default unknown
    measure: bool = False  # evaluation.run on data.validation first, for the final card; else "not yet measured"


@dataclass(config=ConfigDict(extra="forbid"))
class LoopConfig:
    batch_size: int = Field(512, ge=2)  # pairs a step, of all processes together; 512 is the best of Fig. 7
    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1)  # optimizer steps, instead of epochs
    micro_batch_size: int | None = Field(None, ge=1)  # pairs a process holds at a time (cached gradients); None: all
    group_texts: bool = True  # by length, each group padded to its own longest; False: long, short, as they come
    compile: bool = False  # torch.compile of the towers' layers
    log_every: int = Field(10, ge=1)  # steps
    log_ids: bool = False  # every batch's sample ids into log.jsonl
    # "none" is none of them.
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=lambda: ["tensorboard"])
    validate_every: int | None = Field(None, ge=1)  # steps; always after the last one
    patience: int | None = Field(None, ge=1)  # stop early after so many validations without a better mR
    save_every: int | None = Field(None, ge=1)  # steps; always after the last one
    keep_checkpoints: int = Field(2, ge=1)  # newest ones

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_none(cls, trackers):
        if trackers in (None, "none"):
            return []
        return [trackers] if isinstance(trackers, str) else trackers

    @field_validator("trackers")
    @classmethod
    def _trackers_are_installed(cls, trackers):
        missing = [name for name in trackers if not any(map(find_spec, TRACKERS[name]))]
        if missing:
            raise ValueError(
                f"loop.trackers names {', '.join(missing)}, which is not installed; pip install it, or set it to none"
            )
        return trackers

    def __post_init__(self):
        if self.patience and not self.validate_every:
            raise ValueError("loop.patience counts validations; set loop.validate_every too")

    def count_steps(self, rows: int) -> int:
        """Count the optimizer steps of a run; what does not fill a batch at the end of an epoch is left out."""
        return self.steps or max(1, round(self.epochs * (rows // self.batch_size)))


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class TrainConfig:
    """The configuration of a whole run."""

    output_dir: str  # the run folder
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    loop: LoopConfig = Field(default_factory=LoopConfig)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the arithmetic; weights and loss stay float32
    resume: bool = False  # go on from the newest checkpoint in output_dir
    allow_changed_data: bool = False  # when resuming; what changed is in run.json
    push_to_hub: bool = False  # the final model, see `push`
    push: PushConfig = Field(default_factory=PushConfig)

    def __post_init__(self):
        if self.model.init == "scratch" and self.model.tokenizer is None:
            raise ValueError(
                'model.init is "scratch" and model.tokenizer is not set; name a tokenizer, or "train" for one learnt '
                "from the training captions"
            )
        if self.push_to_hub and self.push.repo is None:
            raise ValueError("push_to_hub is set and push.repo is not; name a repository, as owner/name")
        if self.push_to_hub and not self.data.validation and (self.push.measure or self.push.every == "validation"):
            raise ValueError("push.measure and push.every: validation need data.validation; set it, or leave them out")
        if self.push_to_hub and self.push.measure and isinstance(self.data.validation, list):
            raise ValueError(
                "push.measure takes one data.validation, not a list of sources; name one, or leave it out"
            )
        if self.loop.patience and not self.data.validation:
            raise ValueError("loop.patience is set and data.validation is not; set both or neither")
