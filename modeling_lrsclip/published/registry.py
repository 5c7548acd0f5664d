"""
The published models of the paper by name: where they come from, and what their files leave open.

`--model remoteclip-vit-l-14` fetches a model, `--model path/to/RemoteCLIP-ViT-L-14.pt` takes a file that is here
already, `--model remoteclip-vit-l-14=path/to/weights.pt` says which model a file of another name is.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class PublishedModel:
    """A row of the registry."""

    name: str
    title: str
    repo: str | None = None  # on the Hub
    file: str | None = None  # in `repo`, or what unpacking `url` leaves; None: a repository in HuggingFace format
    preset: str | None = None  # of `modeling_lrsclip.convert`: the activation that published code runs it with
    activation: str | None = None  # where the preset does not say
    url: str | None = None  # where no Hub has it

    @property
    def by_hand(self) -> str:
        """How to get it without this program."""
        if self.url:
            return f"download {self.url}, unpack it and give --model {self.name}=path/to/{self.file}"
        if not self.file:
            return f"clone https://huggingface.co/{self.repo} and give its folder with --model"
        link = f"https://huggingface.co/{self.repo}/blob/main/{self.file}"
        return f"download {link} and give --model path/to/{Path(self.file).name}"


_SKYSCRIPT = "https://opendatasharing.s3.us-west-2.amazonaws.com/SkyScript/ckpt"

MODELS = {
    model.name: model
    for model in (
        PublishedModel("clip-vit-b-32", "CLIP ViT-B/32", "openai/clip-vit-base-patch32"),
        PublishedModel("clip-vit-b-16", "CLIP ViT-B/16", "openai/clip-vit-base-patch16"),
        PublishedModel("clip-vit-l-14", "CLIP ViT-L/14", "openai/clip-vit-large-patch14"),
        # beichenzbc/Long-CLIP README.md
        PublishedModel(
            "long-clip-vit-b-16", "Long-CLIP ViT-B/16", "BeichenZhang/LongCLIP-B", "longclip-B.pt", "long-clip"
        ),
        PublishedModel(
            "long-clip-vit-l-14", "Long-CLIP ViT-L/14", "BeichenZhang/LongCLIP-L", "longclip-L.pt", "long-clip"
        ),
        # ChenDelong1999/RemoteCLIP README.md
        PublishedModel(
            "remoteclip-vit-b-32",
            "RemoteCLIP ViT-B/32",
            "chendelong/RemoteCLIP",
            "RemoteCLIP-ViT-B-32.pt",
            "remoteclip",
        ),
        PublishedModel(
            "remoteclip-vit-l-14",
            "RemoteCLIP ViT-L/14",
            "chendelong/RemoteCLIP",
            "RemoteCLIP-ViT-L-14.pt",
            "remoteclip",
        ),
        # om-ai-lab/RS5M README.md; the files are in ckpt/ of the repository on the Hub
        PublishedModel(
            "georsclip-vit-b-32", "GeoRSCLIP ViT-B/32", "Zilun/GeoRSCLIP", "ckpt/RS5M_ViT-B-32.pt", "georsclip"
        ),
        # No published code loads this one. It came with RS5M_ViT-L-14-336.pt, a size that only OpenAI's CLIP has, and
        # that runs QuickGELU.
        PublishedModel(
            "georsclip-vit-l-14",
            "GeoRSCLIP ViT-L/14",
            "Zilun/GeoRSCLIP",
            "ckpt/RS5M_ViT-L-14.pt",
            "georsclip",
            activation="quick_gelu",
        ),
        PublishedModel(
            "georsclip-vit-h-14", "GeoRSCLIP ViT-H/14", "Zilun/GeoRSCLIP", "ckpt/RS5M_ViT-H-14.pt", "georsclip"
        ),
        # MitsuiChen14/LRSCLIP README.md
        PublishedModel(
            "lrsclip-vit-b-16", "LRSCLIP ViT-B/16", "cwz14/LRSCLIP_ViT-B-16", "LRSCLIP_ViT-B-16.pt", "lrsclip"
        ),
        PublishedModel(
            "lrsclip-vit-l-14", "LRSCLIP ViT-L/14", "cwz14/LRSCLIP_ViT-L-14", "LRSCLIP_ViT-L-14.pt", "lrsclip"
        ),
        # wangzhecheng/SkyScript README.md: zip files, each with an epoch_20.pt
        PublishedModel(
            "skyclip-vit-b-32",
            "SkyCLIP ViT-B/32",
            file="epoch_20.pt",
            preset="skyclip",
            url=f"{_SKYSCRIPT}/SkyCLIP_ViT_B32_top50pct.zip",
        ),
        PublishedModel(
            "skyclip-vit-l-14",
            "SkyCLIP ViT-L/14",
            file="epoch_20.pt",
            preset="skyclip",
            url=f"{_SKYSCRIPT}/SkyCLIP_ViT_L14_top50pct.zip",
        ),
    )
}
# Rows of the paper without a checkpoint of CLIP's kind; only their printed figures are shown.
PAPER_ONLY = {"selo-v1": "AMFMN of xiaoyuan1996/AMFMN", "selo-v2": "AMFMN of xiaoyuan1996/AMFMN"}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is and how it is read: what `evaluation.embedding.load_encoder` needs."""

    path: str  # folder, Hub id, or checkpoint file
    model: PublishedModel | None = None  # its row in the registry, where it has one
    revision: str | None = None  # commit of the Hub that `path` was fetched from

    @property
    def is_file(self) -> bool:
        """A published checkpoint file, read by `modeling_lrsclip.convert.load_published`; else `from_pretrained`."""
        return Path(self.path).is_file()

    @property
    def label(self) -> str | None:
        """The registry's name, if it has one."""
        return self.model.name if self.model else None

    @property
    def load_options(self) -> dict[str, str]:
        """Keyword arguments of `load_published` that the file itself leaves open."""
        if not (self.is_file and self.model):
            return {}
        options = {"preset": self.model.preset, "activation": self.model.activation}
        return {name: value for name, value in options.items() if value}


def resolve(given: str) -> ModelSource:
    """
    What `--model` was given -> a folder, Hub id or file that can be loaded.

    Args:
        given: a name of `MODELS`, a checkpoint file, `NAME=FILE` or `NAME=FOLDER`, a folder in HuggingFace format, or
            a Hub id.

    Raises:
        `ValueError`: one sentence for a name or path that is none of these, a folder without config.json, a file of
            another kind, or a published model that cannot be fetched; the last says what to download.
    """
    name, separator, path = given.partition("=")
    if separator and name.lower() in MODELS:
        return _local(path, MODELS[name.lower()])
    if Path(given).expanduser().exists():
        return _local(given, None)
    if given.lower() in MODELS:
        return fetch(MODELS[given.lower()])
    if given.lower() in PAPER_ONLY:
        raise ValueError(
            f"{given} ({PAPER_ONLY[given.lower()]}) is no CLIP; only the paper's figures of it are shown."
        )
    if given.lower().endswith(WEIGHT_FILES):
        raise ValueError(f"checkpoint file {given} does not exist.")
    if given.count("/") == 1 and not given.startswith((".", "~", "/")) and not Path(given).parent.is_dir():
        return ModelSource(given)
    near = difflib.get_close_matches(given.lower(), MODELS, n=1, cutoff=0.5)
    raise ValueError(
        f"model {given} does not exist; --model takes folders that save_pretrained wrote, checkpoint files, Hub ids, "
        f"or a name: {', '.join(MODELS)}." + (f" Did you mean {near[0]}?" if near else "")
    )


def _local(given: str, model: PublishedModel | None) -> ModelSource:
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model folder {given} has no config.json; save_pretrained writes one.")
    elif not path.is_file():
        raise ValueError(f"{given} does not exist; give the checkpoint file or folder of {model.name}.")
    elif path.suffix.lower() not in WEIGHT_FILES:
        raise ValueError(f"{given} is no checkpoint file; wanted {', '.join(WEIGHT_FILES)}, or a model folder.")
    return ModelSource(str(path), model or _known_by_file_name(path))


def _known_by_file_name(path: Path) -> PublishedModel | None:
    """The published model that a file, or the file that a folder was converted from, is named as."""
    name = path.name
    if path.is_dir():
        record = path / "conversion.json"  # of modeling_lrsclip.convert
        conversion = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        stretched = any(line.startswith("stretched") for line in conversion.get("decisions", []))
        name = "" if stretched else conversion.get("source", "")  # stretched, it is no longer what was published
    named = (model for model in MODELS.values() if model.repo and model.file)  # SkyCLIP's epoch_20.pt tells nothing
    return next((model for model in named if Path(model.file).name.lower() == name.lower()), None)


def fetch(model: PublishedModel) -> ModelSource:
    """
    Fetches a published checkpoint file, or sees that a repository in HuggingFace format can be reached.

    Raises:
        `ValueError`: one sentence with the reason and the way by hand.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not model.repo:
        raise ValueError(f"{model.name} is not on the Hub; {model.by_hand}.")
    try:
        path = Path(hf_hub_download(model.repo, model.file or "config.json"))
    except (OSError, *HfHubHTTPError.__bases__) as error:  # among the bases: what the HTTP client itself raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, LocalEntryNotFoundError):
            reason = "the Hub cannot be reached, and its cache here does not hold it"
        what = f"{model.file} of {model.repo}" if model.file else model.repo
        raise ValueError(f"{model.name}: {what} could not be fetched ({reason}); {model.by_hand}.") from error
    commit = path.relative_to(path.parents[model.file.count("/") + 1 if model.file else 1]).parts[0]
    return ModelSource(str(path) if model.file else model.repo, model, commit)


def label_models(sources: Sequence[ModelSource]) -> list[str]:
    """The registry's names; for others the folders' names, with as many parent folders as it takes to tell them apart."""
    parts = [_telling_parts(Path(source.path).absolute().parts) for source in sources]
    if len(set(parts)) < len(parts):
        raise ValueError("the same model is given twice with --model.")
    named = [source.label for source in sources]
    depth = 1
    while True:
        labels = [name or "/".join(own[-depth:]) for name, own in zip(named, parts, strict=True)]
        if len(set(labels)) == len(labels):
            return labels
        # Two files of one published model have the same name: then paths tell them apart.
        twice = {name for name in named if named.count(name) > 1}
        named = [None if name in twice else name for name in named]
        depth += not twice - {None}


def _telling_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """A training run leaves its models in `RUN/final` and `RUN/best`: the run's name says more."""
    if parts[-1] == "final":
        return parts[:-1]
    return (*parts[:-2], "/".join(parts[-2:])) if parts[-1] == "best" else parts
