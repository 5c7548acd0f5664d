"""A recipe: which sources become rows by which route, with which captioners and prompts. One YAML file or several."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from modeling_lrsclip.files.configuration import plain_values, read_yaml, set_field, split_setting, validate
from modeling_lrsclip.files.hashing import json_sha256


STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
Route = Literal["merge", "compress", "expand", "anchor"]
# What may change between two runs of one build: it decides how fast a row comes, or when to stop, not what is in it.
FREE = ("max_skipped_fraction", "max_failures_in_a_row", "max_failed_fraction", "lookahead", "verify")
FREE_OF_SOURCE = ("facts", "not_verified")
FREE_OF_CAPTIONER = ("base_url", "api_key_variable", "concurrency", "timeout", "tries", "batch_size", "device_map")
# Fields that may hold a path of this machine.
LOCAL = ("path", "images", "against", "footprints", "tokenizer", "model", "prompt")


@dataclass(config=STRICT)
class KeyConfig:
    """Steps, in order, from an image's name to the key that two sources are joined on."""

    basename: bool = False  # without folders
    stem: bool = False  # without suffix
    lower: bool = False  # in small letters; names that then are alike stop the build
    replace: list[tuple[str, str]] = Field(default_factory=list)  # regular expression, replacement; applied last


@dataclass(config=STRICT)
class MatchConfig:
    """The values of a column that are taken: these, or those that begin or look so. All that is set must fit."""

    values: list[str | int | float | bool | None] | None = None  # one of these; compared as texts
    prefix: str | list[str] | None = None  # it begins with this, or with one of these
    pattern: str | None = None  # a regular expression that it holds; ^ and $ stand for its ends

    @model_validator(mode="before")
    @classmethod
    def _value_or_values(cls, value: Any):
        if isinstance(value, dict | ArgsKwargs):
            return value
        return {"values": value if isinstance(value, list) else [value]}

    def __post_init__(self):
        if not (self.values or self.prefix or self.pattern):
            raise ValueError("where needs a value, a list of values, a prefix or a pattern")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"where: pattern {self.pattern!r} is no regular expression: {error}") from None

    def __str__(self) -> str:
        return " and ".join(f"{name} {value!r}" for name, value in vars(self).items() if value)

    def fits(self, value: Any) -> bool:
        """Tell whether a value of the column is taken."""
        if self.values and str(value) not in map(str, self.values):
            return False
        text = "" if value is None else str(value)
        prefixes = (self.prefix,) if isinstance(self.prefix, str) else tuple(self.prefix or ("",))
        return text.startswith(prefixes) and re.search(self.pattern or "", text) is not None


@dataclass(config=STRICT)
class ReadConfig:
    """The place that rows are read from. Every path may be relative to the root and may hold ~ and environment variables."""

    # A folder of images, one with a folder a class, tables (parquet, CSV, TSV, JSON, JSON lines), tars, a Hub data set.
    kind: Literal["images", "class_folders", "table", "webdataset", "hub"]
    path: str  # folder; file or glob of files; glob of tars; Hub id
    images: str | None = None  # folder that a table's image paths start at; by default the table's own
    split: str = "train"  # of a Hub data set; of a file in Karpathy's format, where it may be "all"
    encoding: str = "utf-8-sig"  # of text files, as Python names it
    # The source's names of image, key, long_text, short_text, class_name, longitude, latitude, gsd, date, labels,
    # bounds, and of others, which are kept for templates; `a.b` reaches into an object, "{a}/{b}" joins two columns.
    columns: dict[str, str] = Field(default_factory=dict)
    captions: Literal["each", "together", "first"] = "each"  # several short captions: a row each, one row, the first
    # By column: a value, a list of values, {prefix: …} or {pattern: …}. Other rows are not taken.
    where: dict[str, MatchConfig] = Field(default_factory=dict)
    key: KeyConfig = Field(default_factory=KeyConfig)  # for a join
    limit: int | None = Field(None, ge=1)  # rows; the first so many


@dataclass(config=STRICT)
class LabelsConfig:
    """Vector labels, boxes or masks that become anchors (route 4)."""

    kind: Literal["class_name", "objects", "coco", "geojson", "shapefile", "masks"]  # class_name, objects: of a column
    path: str | None = None  # file, or folder with one file an image of the same stem
    field: str | None = None  # property that holds the label; of an object in a column, "kind" or "label"
    attribute: str | None = None  # property that is put before the label, such as a colour
    names: dict[str, str] = Field(default_factory=dict)  # stored label or mask value -> name; "" drops it
    # All that would be labelled if it were there: naming another of them is a caption's fault. By default what names gives.
    classes: list[str] = Field(default_factory=list)
    min_share: float = Field(0.0, ge=0, le=1)  # of the image's area; smaller objects are left out
    max_positions: int = Field(6, ge=0)  # named a label; the count is always whole


@dataclass(config=STRICT)
class TextConfig:
    """The origin of a long or a short text: the source itself, a template, or a captioner and its prompt."""

    captioner: str | None = None  # of the recipe's captioners
    prompt: str | None = None  # name@version of training/lrs2m/prompts, or a YAML file
    template: str | None = None  # of metadata_captions; "labels" puts the labels into a sentence
    attempts: int = Field(3, ge=1)  # each with another seed
    candidates: int = Field(1, ge=1)  # good answers to choose from
    anchor_share: float = Field(0.8, ge=0, le=1)  # of the label names that a text written from anchors must mention

    def __post_init__(self):
        if self.captioner and self.template:
            raise ValueError("a text has a captioner or a template, not both; remove one")
        if bool(self.captioner) != bool(self.prompt):
            raise ValueError("captioner and prompt belong together; set both or neither")


@dataclass(config=STRICT)
class SourceConfig:
    """One data set, or a part of one, and how its rows get their two texts."""

    name: str  # the subset, as in Table I
    route: Route  # how the long and the short text come about, see the table of routes
    licence: str  # of images and given captions; an SPDX name, or the terms in a sentence
    read: ReadConfig  # where images and given captions are
    licence_url: str | None = None  # where the terms are
    join: ReadConfig | None = None  # where given captions are, found by their key, if they are not in `read`
    long: TextConfig = Field(default_factory=TextConfig)  # the long text's origin; empty: given
    short: TextConfig = Field(default_factory=TextConfig)  # the short text's origin; empty: given
    labels: LabelsConfig | None = None  # anchor needs them; other routes may take them for a template
    images: Literal["embed", "omit"] | None = None  # by default the recipe's
    against: list[str] | None = None  # evaluation sets of this source; by default the recipe's
    paper_source: str | None = None  # the row of Table I it stands for, where its name is another
    fields: dict[str, Any] = Field(default_factory=dict)  # constants for templates, such as gsd: 0.3
    facts: list[str] = Field(default_factory=list)  # where the layout, columns and licence were looked up
    not_verified: list[str] = Field(default_factory=list)  # what of them was not; `--check` says it

    @property
    def texts(self) -> dict[str, TextConfig]:
        """The origins of the `long` and the `short` text."""
        return {"long": self.long, "short": self.short}

    def __post_init__(self):
        if not self.licence.strip():
            raise ValueError(f"the licence of source {self.name} is empty; name it, or say in a sentence what holds")
        for column, text, routes in (
            ("long", self.long, ("expand", "anchor")),
            ("short", self.short, ("compress", "anchor")),
        ):
            asked = self.route in routes
            if asked != bool(text.captioner):
                need = "needs a captioner and a prompt" if asked else "is given by the source and has no captioner"
                raise ValueError(f"source {self.name}: on route {self.route} the {column} text {need}")
        if self.join is not None and self.route == "anchor":
            raise ValueError(f"source {self.name}: join brings given captions, and route anchor has none; remove it")
        if self.route == "anchor" and self.labels is None:
            raise ValueError(f"source {self.name}: route anchor needs labels")
        if "labels" in (self.long.template, self.short.template) and self.labels is None:
            raise ValueError(f'source {self.name}: template "labels" needs labels')


@dataclass(config=STRICT)
class CaptionerConfig:
    """A model that writes captions, behind a server or in this process."""

    kind: Literal["openai", "transformers"]  # any compatible server, or a model loaded here
    model: str  # name at the endpoint; folder or Hub id
    temperature: float = Field(0.7, ge=0)  # 0: the likeliest token each time
    top_p: float = Field(0.9, gt=0, le=1)  # share of the probability that tokens are drawn from
    max_tokens: int = Field(512, ge=1)  # of the model's own tokenizer, of an answer
    max_image_side: int = Field(1024, ge=28)  # pixels; larger images are sent smaller
    # openai
    base_url: str | list[str] | None = None  # such as http://localhost:8000/v1; of several servers a list
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key, where one is needed
    concurrency: int = Field(32, ge=1)  # requests at a time, of each server
    timeout: float = Field(120, gt=0)  # seconds for one answer
    tries: int = Field(8, ge=1)  # of one request that the network or the server failed
    extra: dict[str, Any] = Field(default_factory=dict)  # further fields of a request's body
    batch_size: int = Field(8, ge=1)  # transformers: requests of one pass, at most
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"  # transformers
    device_map: str = "auto"  # transformers: as its from_pretrained takes it
    revision: str | None = None  # transformers: of a Hub id
    trust_remote_code: bool = False  # transformers: run code that comes with the model

    def __post_init__(self):
        if (self.kind == "openai") != bool(self.base_urls):
            raise ValueError("base_url belongs to a captioner of kind openai, and one of that kind needs it")
        for url in self.base_urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"base_url {url} must begin with http:// or https://")
            if self.base_urls.count(url) > 1:
                raise ValueError(f"base_url {url} is given twice; name every server once")

    @property
    def base_urls(self) -> list[str]:
        """The addresses of `base_url`, one a server."""
        return [self.base_url] if isinstance(self.base_url, str) else self.base_url or []


@dataclass(config=STRICT)
class DuplicatesConfig:
    """Near-duplicates, which are left out and listed."""

    inside: bool = True  # the set itself: of near-equal images the first is kept; rows of one image file all are
    # evaluation images: whatever evaluation.run takes as data, folders
    against: list[str] = Field(default_factory=list)
    distance: int = Field(8, ge=0, le=18)  # bits of 64 of a perceptual hash in which copies may differ
    crops: bool = True  # look for crops too, at 25 times the hashes
    # Vector files in WGS 84 of what evaluation images show; a row whose ground overlaps is left out too.
    footprints: list[str] = Field(default_factory=list)


@dataclass(config=STRICT)
class CandidatesConfig:
    """How the best of several good answers is chosen."""

    model: str  # CLIP or LRSCLIP checkpoint that scores candidate captions
    rotations: int = Field(4, ge=1, le=4)  # quarter turns over which a caption's similarity is to be stable
    stability: float = Field(1.0, ge=0)  # weight of the deviation over the turns against the mean similarity


# YAML reads a bare on or off as true or false.
Level = Annotated[
    Literal["on", "warn", "off"],
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]


@dataclass(config=STRICT)
class ChecksConfig:
    """Checks of what captioners write. on: refused and asked again; warn: kept, counted, in the column warnings; off."""

    cut_off: Level = "on"  # ended by max_tokens
    refusal: Level = "on"  # a refusal or an excuse, anywhere
    error_words: Level = "on"  # a server's or a program's message
    special_tokens: Level = "on"  # of a chat template
    role_names: Level = "on"  # ASSISTANT:
    prompt_echo: Level = "on"  # six words in a row of the prompt's instructions
    boilerplate: Level = "on"  # words about the caption, the list, the task
    tags: Level = "on"  # HTML
    urls: Level = "on"  # and names of files
    structure: Level = "on"  # JSON, Markdown, tables, headings
    script: Level = "on"  # letters not Latin, emoji
    language: Level = "on"  # a sentence that is not English
    repetition: Level = "on"  # the same words again and again
    length: Level = "on"  # empty, N/A, outside of long_tokens or short_words
    unknowable: Level = "on"  # names of places, dates, the compass, where the prompt has none
    negated_class: Level = "on"  # a labelled class is said not to be there
    missing_class: Level = "on"  # fewer labelled classes named than anchor_share
    count: Level = "on"  # a number that the labels contradict
    excluded_class: Level = "on"  # one of labels.classes that is not labelled here
    invented_landmark: Level = "warn"  # a stadium, airport or the like that no label and no prompt has
    agreement: Level = "on"  # most of the short caption is not in the long one
    repeated_answer: Level = "on"  # one long answer, or nearly one, for more than 3 images
    repeated_row: Level = "on"  # equal image and texts; the first row is kept


@dataclass(config=STRICT)
class VerifyConfig:
    """Second opinions on the captions of a finished set, for training.lrs2m.verify. Without thresholds nothing is left out."""

    model: str | None = None  # CLIP or LRSCLIP, for the similarity of texts and sentences to the image
    captioner: str | None = None  # of the recipe's, one that sees images: claims are asked back as yes or no
    min_similarity: float | None = Field(None, ge=-1, le=1)  # cosine of the long text and of the short one, at least
    min_confirmed: float | None = Field(None, ge=0, le=1)  # share of the claims answered with yes, at least

    def __post_init__(self):
        if not (self.model or self.captioner):
            raise ValueError("verify needs a model, a captioner or both")
        for threshold, source in (("min_similarity", "model"), ("min_confirmed", "captioner")):
            if getattr(self, threshold) is not None and not getattr(self, source):
                raise ValueError(f"verify.{threshold} needs verify.{source}")


@dataclass(config=STRICT)
class Recipe:
    """A whole recipe: one YAML file, or several together."""

    name: str  # of the data set, as its card has it
    sources: list[SourceConfig]  # one after another
    captioners: dict[str, CaptionerConfig] = Field(default_factory=dict)  # by the name that texts ask for
    seed: int = Field(0, ge=0)  # of the split and of every request's own seed
    validation_fraction: float = Field(0.01, ge=0, lt=1)  # of the images
    format: Literal["parquet", "webdataset"] = "parquet"  # of the shards
    images: Literal["embed", "omit"] = "embed"  # omit: captions with keys and hashes, without pixels
    tokenizer: str = "openai/clip-vit-base-patch16"  # folder or Hub id that token lengths are counted with
    shard_rows: int = Field(5000, ge=1)  # of a file, at most
    shard_bytes: int = Field(512 * 2**20, ge=1)  # of its rows, about
    min_side: int = Field(32, ge=1)  # pixels; smaller images are skipped
    max_skipped_fraction: float = Field(0.01, ge=0, le=1)  # corrupt or tiny images, empty or garbled captions
    max_failures_in_a_row: int = Field(50, ge=1)  # rows without an answer, before the build stops
    max_failed_fraction: float = Field(0.1, ge=0, le=1)  # rows whose answers were all refused
    long_tokens: tuple[int, int] = (40, 248)  # CLIP tokens of a written long text
    short_words: int = Field(20, ge=1)  # of a written short text, at most
    lookahead: int | None = Field(None, ge=1)  # rows worked on at a time; by default by the captioners
    checks: ChecksConfig = Field(default_factory=ChecksConfig)  # of what captioners write
    duplicates: DuplicatesConfig = Field(default_factory=DuplicatesConfig)  # what is left out as known
    candidates: CandidatesConfig | None = None  # needed where a text asks for several candidates
    verify: VerifyConfig | None = None  # second opinions, asked by training.lrs2m.verify

    @property
    def used_captioners(self) -> dict[str, CaptionerConfig]:
        """The captioners that a source asks, by name."""
        used = {text.captioner for source in self.sources for text in source.texts.values()}
        return {name: config for name, config in self.captioners.items() if name in used}

    def __post_init__(self):
        shortest, longest = self.long_tokens
        if not 2 <= shortest < longest:
            raise ValueError(
                f"long_tokens=[{shortest}, {longest}] must be the fewest and the most CLIP tokens of a written long text, "
                "such as [40, 248]"
            )
        for source in self.sources:
            captioner = self.captioners.get(source.long.captioner)
            if captioner is not None and captioner.max_tokens < shortest / 2:  # of other tokenizers
                raise ValueError(
                    f"captioners.{source.long.captioner}.max_tokens={captioner.max_tokens} cannot hold the {shortest} "
                    "tokens that long_tokens asks for; raise it"
                )
        if not self.sources:
            raise ValueError("a recipe needs at least one source")
        names, known = [source.name for source in self.sources], ", ".join(self.captioners) or "none"
        for name in names:
            if names.count(name) > 1 or "/" in name:
                raise ValueError(f"source name {name!r} must be unique and without a slash")
        if self.verify and self.verify.captioner and self.verify.captioner not in self.captioners:
            raise ValueError(f"verify asks captioner {self.verify.captioner}; the recipe has {known}")
        for source in self.sources:
            for text in source.texts.values():
                if text.captioner and text.captioner not in self.captioners:
                    raise ValueError(f"source {source.name} asks captioner {text.captioner}; the recipe has {known}")
                if text.candidates > 1 and self.candidates is None:
                    raise ValueError(
                        f"source {source.name} asks for {text.candidates} candidates; set candidates.model"
                    )


def read_recipe(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """
    Read recipe files. When there are several, their sources and captioners are put together, other fields come from the
    first.

    Args:
        paths: YAML files.
        overrides: `field=value` with dots between fields and numbers for places in a list:
            `captioners.mllm.base_url=http://gpu:8000/v1`, `sources.0.read.path=~/UCMerced`.

    Raises:
        `ValueError`: all mistakes at once, with the nearest valid name.
    """
    values: dict[str, Any] = {}
    for path in paths:
        _add(values, read_yaml(path, "ready recipes are in training/lrs2m/recipes/"), path)
    for override in overrides:
        set_field(values, *split_setting(override))
    hint = "every source must name its licence, which goes into the rows and the card"
    return validate(Recipe, values, hints={"licence": hint})


def recipe_hash(recipe: Recipe, prompts: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of what decides the rows: the recipe but for its `FREE` fields, and its prompts by source and text."""
    values = plain_values(recipe)
    for name in FREE:
        values.pop(name)
    for source in values["sources"]:
        for name in FREE_OF_SOURCE:
            source.pop(name)
    values["captioners"] = {name: values["captioners"][name] for name in recipe.used_captioners}
    for captioner in values["captioners"].values():
        for name in FREE_OF_CAPTIONER:
            captioner.pop(name)
    words = {source: {which: prompt.hash for which, prompt in texts.items()} for source, texts in prompts.items()}
    return json_sha256([values, words], sort_keys=True)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's paths and addresses: of a path its last part."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(key, one) for key, one in value.items() if key not in ("base_url", "api_key_variable")}
        if isinstance(value, list):
            return [shown(name, one) for one in value]
        if isinstance(value, str) and name in LOCAL and (value[:1] in ("/", "~", "$", ".") or Path(value).exists()):
            return Path(value).name
        return value

    return shown("", plain_values(recipe))


def resolve(path: str, root: Path) -> Path:
    """A path of a recipe: ~ and variables expanded, relative ones from `root`."""
    return root / Path(os.path.expandvars(path)).expanduser()


def _add(values: dict[str, Any], one: dict[str, Any], path: str | Path) -> None:
    for name, kind in (("captioners", dict), ("sources", list)):
        if not isinstance(one.get(name) or kind(), kind):
            raise ValueError(
                f"{path}: {name} holds a {type(one[name]).__name__}; write a {kind.__name__}, as in the ready recipes."
            )
    for name, captioner in (one.get("captioners") or {}).items():
        if values.setdefault("captioners", {}).setdefault(name, captioner) != captioner:
            raise ValueError(f"{path} describes captioner {name} otherwise than a recipe before it; rename one.")
    values.setdefault("sources", []).extend(one.get("sources") or [])
    for name, value in one.items():
        if name not in ("captioners", "sources"):
            values.setdefault(name, value)


ROUTES = get_args(Route)
