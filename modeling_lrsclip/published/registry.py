"""
The published models of the paper by name: where they come from, and what their files leave open.

`--model remoteclip-vit-l-14` fetches a model, `--model path/to/RemoteCLIP-ViT-L-14.pt` takes a file that is here
already, `--model remoteclip-vit-l-14=path/to/weights.pt` says which model a file of another name is.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.documents import first_line, read_json, refuse_malformed


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
    revision: str = "main"  # commit of `repo`; `main` where no commit with the file is known to this project
    successor: str | None = None  # row of the weights that now stand where these did
    source: str = ""  # repository and file that say where the weights are
    licence: str = "not stated"  # of the authors' code repository; what the weights' own states, the Hub is asked for

    @property
    def address(self) -> str:
        """`file of repository at revision`, for messages."""
        if not self.repo:
            return f"{self.file} in {self.url}"
        return f"{self.file or 'a folder in HuggingFace format'} of {self.repo} at {self.revision[:12]}"

    @property
    def by_hand(self) -> str:
        """Sentence on how to get it without this program."""
        if self.url:
            return f"download {self.url}, unpack it and give --model {self.name}=path/to/{self.file}"
        if not self.file:
            return f"clone https://huggingface.co/{self.repo} and give its folder with --model"
        link = f"https://huggingface.co/{self.repo}/blob/{self.revision}/{self.file}"
        return f"download {link} and give --model path/to/{Path(self.file).name}"


_SKYSCRIPT = "https://opendatasharing.s3.us-west-2.amazonaws.com/SkyScript/ckpt"
_REMOTECLIP = "bf1d8a3ccf2ddbf7c875705e46373bfe542bce38"
_GEORSCLIP = "4920188e6eba4e711ef9848cfd7cb77e874ee33f"


def _openai(size: str, title: str, repo: str, revision: str) -> PublishedModel:
    row = (f"clip-{size}", f"CLIP {title}", f"openai/{repo}")
    return PublishedModel(*row, revision=revision, source="openai/CLIP README.md", licence="MIT")


def _long_clip(size: str, title: str, letter: str) -> PublishedModel:
    repo, file = f"BeichenZhang/LongCLIP-{letter}", f"longclip-{letter}.pt"
    source = "beichenzbc/Long-CLIP README.md"
    return PublishedModel(f"long-clip-{size}", f"Long-CLIP {title}", repo, file, "long-clip", source=source)


def _remoteclip(size: str, title: str, file: str) -> PublishedModel:
    source = "ChenDelong1999/RemoteCLIP README.md"
    row = (f"remoteclip-{size}", f"RemoteCLIP {title}", "chendelong/RemoteCLIP", file, "remoteclip")
    return PublishedModel(*row, revision=_REMOTECLIP, source=source)


def _georsclip(size: str, title: str, file: str, activation: str | None = None) -> PublishedModel:
    source = "om-ai-lab/RS5M README.md"  # the files are in ckpt/ of the repository on the Hub
    row = (f"georsclip-{size}", f"GeoRSCLIP {title}", "Zilun/GeoRSCLIP", f"ckpt/{file}", "georsclip", activation)
    return PublishedModel(*row, revision=_GEORSCLIP, source=source, licence="MIT")


def _dgtrs_clip(size: str, title: str) -> PublishedModel:
    """Version 2 of the paper, July 2025: other weights of the same architecture."""
    repo, file = f"MitsuiChen14/DGTRS-CLIP-{title}", f"DGTRS-CLIP-{title}.pt"
    row = (f"dgtrs-clip-{size}", f"DGTRS-CLIP {_slashed(title)}", repo, file, "lrsclip")
    return PublishedModel(*row, source="MitsuiChen14/DGTRS README.md", licence="Apache-2.0")


def _lrsclip(size: str, title: str, revision: str, source: str) -> PublishedModel:
    """Version 1, March 2025. The authors renamed its repositories and put version 2 in its place."""
    repo, file = f"MitsuiChen14/DGTRS-CLIP-{title}", f"LRSCLIP_{title}.pt"
    row = (f"lrsclip-{size}", f"LRSCLIP {_slashed(title)}", repo, file, "lrsclip")
    more = {"successor": f"dgtrs-clip-{size}", "source": source, "licence": "Apache-2.0"}
    return PublishedModel(*row, revision=revision, **more)


def _skyclip(size: str, title: str, archive: str) -> PublishedModel:
    """A zip file with an epoch_20.pt."""
    row = {"file": "epoch_20.pt", "preset": "skyclip", "url": f"{_SKYSCRIPT}/{archive}", "licence": "MIT"}
    source = "wangzhecheng/SkyScript README.md"
    return PublishedModel(f"skyclip-{size}", f"SkyCLIP {title}", **row, source=source)


def _farslip(stage: int, size: str, title: str) -> PublishedModel:
    row = (f"farslip{stage}-{size}", f"FarSLIP-s{stage} {_slashed(title)}", "ZhenShiL/FarSLIP")
    source = "NJU-LHRS/FarSLIP README.md"
    return PublishedModel(*row, f"FarSLIP{stage}_{title}.pt", "farslip", source=source, licence="MIT")


def _slashed(size: str) -> str:
    """`ViT-B-16`, as in file names -> `ViT-B/16`, as in papers."""
    return "/".join(size.rsplit("-", 1))


MODELS = {
    model.name: model
    for model in (
        _openai("vit-b-32", "ViT-B/32", "clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"),
        _openai("vit-b-16", "ViT-B/16", "clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
        _openai("vit-l-14", "ViT-L/14", "clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),
        _long_clip("vit-b-16", "ViT-B/16", "B"),
        _long_clip("vit-l-14", "ViT-L/14", "L"),
        _remoteclip("vit-b-32", "ViT-B/32", "RemoteCLIP-ViT-B-32.pt"),
        _remoteclip("vit-l-14", "ViT-L/14", "RemoteCLIP-ViT-L-14.pt"),
        _georsclip("vit-b-32", "ViT-B/32", "RS5M_ViT-B-32.pt"),
        # No published code loads this one. It came with RS5M_ViT-L-14-336.pt, a size that only OpenAI's CLIP has, and
        # that runs QuickGELU.
        _georsclip("vit-l-14", "ViT-L/14", "RS5M_ViT-L-14.pt", "quick_gelu"),
        _georsclip("vit-h-14", "ViT-H/14", "RS5M_ViT-H-14.pt"),
        _dgtrs_clip("vit-b-16", "ViT-B-16"),
        _dgtrs_clip("vit-l-14", "ViT-L-14"),
        # The commit with this file is not known here: the repository's history is searched for it.
        _lrsclip("vit-b-16", "ViT-B-16", "main", "MitsuiChen14/LRSCLIP README.md, before the repository was renamed"),
        _lrsclip("vit-l-14", "ViT-L-14", "09dc0a7b6532f769aa64dae957bfbad068d2735f", "Dmygithub/AdaptOVCD INSTALL.md"),
        _skyclip("vit-b-32", "ViT-B/32", "SkyCLIP_ViT_B32_top50pct.zip"),
        _skyclip("vit-l-14", "ViT-L/14", "SkyCLIP_ViT_L14_top50pct.zip"),
        _farslip(1, "vit-b-32", "ViT-B-32"),
        _farslip(1, "vit-b-16", "ViT-B-16"),
        _farslip(2, "vit-b-32", "ViT-B-32"),
        _farslip(2, "vit-b-16", "ViT-B-16"),
    )
}
# Rows of the paper without a checkpoint of CLIP's kind; only their printed figures are shown.
PAPER_ONLY = {"selo-v1": "AMFMN of xiaoyuan1996/AMFMN", "selo-v2": "AMFMN of xiaoyuan1996/AMFMN"}


@dataclass(frozen=True)
class ModelSource:
    """Location of a model and how it is read, for `modeling_lrsclip.encoding.load_encoder`."""

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


def resolve(value: str) -> ModelSource:
    """
    Find the folder, Hub id or file that can be loaded for a value of `--model`.

    Args:
        value: a name of `MODELS`, a checkpoint file, `NAME=FILE` or `NAME=FOLDER`, a folder in HuggingFace format, or
            a Hub id.

    Raises:
        `ValueError`: one sentence for a name or path that is none of these, a folder without config.json, a file of
            another kind, or a published model that cannot be fetched; the last says what to download.
    """
    name, separator, path = value.partition("=")
    if separator and name.lower() in MODELS:
        return _local(path, MODELS[name.lower()])
    if Path(value).expanduser().exists():
        return _local(value, None)
    if value.lower() in MODELS:
        return fetch(MODELS[value.lower()])
    if value.lower() in PAPER_ONLY:
        shown = "only the paper's figures of it are shown"
        raise ValueError(f"{value} ({PAPER_ONLY[value.lower()]}) is no CLIP; {shown}.")
    if value.lower().endswith(WEIGHT_FILES):
        raise ValueError(f"checkpoint file {value} does not exist.")
    if value.count("/") == 1 and not value.startswith((".", "~", "/")) and not Path(value).parent.is_dir():
        return ModelSource(value)
    near = difflib.get_close_matches(value.lower(), MODELS, n=1, cutoff=0.5)
    raise ValueError(
        f"model {value} does not exist; --model takes folders that save_pretrained wrote, checkpoint files, Hub ids, "
        f"or a name: {', '.join(MODELS)}." + (f" Did you mean {near[0]}?" if near else "")
    )


def _local(value: str, model: PublishedModel | None) -> ModelSource:
    path = Path(value).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "modules.json")):  # of sentence-transformers
            raise ValueError(no_model_in(path))
    elif not path.is_file():
        raise ValueError(f"{value} does not exist; give the checkpoint file or folder of {model.name}.")
    elif path.suffix.lower() not in WEIGHT_FILES:
        raise ValueError(f"{value} is no checkpoint file; wanted {', '.join(WEIGHT_FILES)}, or a model folder.")
    return ModelSource(str(path), model or _known_by_file_name(path))


def no_model_in(folder: Path) -> str:
    """Return a sentence on a folder without `config.json`: what it holds instead, and what to give."""
    trained = [name for name in ("final", "best") if (folder / name / "config.json").is_file()]
    files = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    if trained:
        advice = f"it is the folder of a training run, give its model: {folder / trained[0]}"
    elif files:
        kind = "an open_clip folder" if (folder / "open_clip_config.json").is_file() else "a checkpoint file"
        advice = f"it holds {kind}, {files[0]}: python -m modeling_lrsclip.convert {folder / files[0]} OUT makes a folder of it"
    else:
        advice = "give a model folder as save_pretrained writes it"
    return f"{folder} has no config.json; {advice}."


def _known_by_file_name(path: Path) -> PublishedModel | None:
    """The published model that a file, or the file that a folder was converted from, is named as."""
    name = path.name
    if path.is_dir():
        record = path / "conversion.json"  # of modeling_lrsclip.convert
        conversion = read_json(record, "convert the model again, or remove the file") if record.is_file() else {}
        with refuse_malformed(record, "convert the model again, or remove the file"):
            stretched = any(line.startswith("stretched") for line in conversion.get("decisions", []))
            # Stretched, it is no longer what was published.
            name = "" if stretched else conversion.get("source", "").strip()
    named = (model for model in MODELS.values() if model.repo and model.file)  # SkyCLIP's epoch_20.pt tells nothing
    return next((model for model in named if Path(model.file).name.lower() == name.lower()), None)


def fetch(model: PublishedModel) -> ModelSource:
    """
    Fetches a published checkpoint file, or sees that a repository in HuggingFace format can be reached.

    A file that is not where the registry has it is looked for in the history of its repository, if no commit of it was
    known; the commit found stands in the result.

    Raises:
        `ValueError`: one sentence with the reason and the way by hand.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    if not model.repo:
        raise ValueError(f"{model.name} is not on the Hub; {model.by_hand}.")
    file, revision = model.file or "config.json", model.revision
    try:
        try:
            path = Path(hf_hub_download(model.repo, file, revision=revision))
        except (EntryNotFoundError, RevisionNotFoundError) as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            revision = _revision_in_history(model)
            path = Path(hf_hub_download(model.repo, file, revision=revision))
    except _hub_errors() as error:
        address = f"{model.name}: {model.address}"
        raise ValueError(f"{address} could not be fetched ({_reason(error)}); {model.by_hand}.") from error
    commit = path.relative_to(path.parents[file.count("/") + 1]).parts[0]
    return ModelSource(str(path) if model.file else model.repo, model, commit)


def _hub_errors() -> tuple[type[Exception], ...]:
    """Raised by the client of the Hub, among them what its HTTP library itself raises."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _reason(error: Exception) -> str:
    """The first line of an error of the Hub's client."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub cannot be reached, and its cache here does not hold it"
    return first_line(error)


def _revision_in_history(model: PublishedModel) -> str:
    """
    The newest commit of the model's repository that holds its file.

    Raises:
        `ValueError`: where none does, with what the repository holds instead and the name to use.
    """
    from huggingface_hub import HfApi

    api, file = HfApi(), model.file or "config.json"
    commits = [commit.commit_id for commit in api.list_repo_commits(model.repo)]
    for commit in commits:
        if api.file_exists(model.repo, file, revision=commit):
            return commit
    weights = [name for name in api.list_repo_files(model.repo) if name.endswith(WEIGHT_FILES)]
    instead = f"it holds {', '.join(weights) or 'no weights'}"
    instead += f": --model {model.successor}" if model.successor else ""
    raise ValueError(f"{model.name}: {model.address} is gone from all {len(commits)} commits; {instead}.")


@dataclass(frozen=True)
class PublishedCheck:
    """The answer of the Hub to one row of the registry."""

    model: PublishedModel
    commit: str | None  # that holds the file; None: it is missing, or was not asked for
    size: int | None  # bytes of the file
    licence: str  # as the repository states it now
    problem: str | None = None  # one sentence; None: it is there

    @property
    def line(self) -> str:
        """The check as a line of a table."""
        state = self.problem or f"commit {(self.commit or '-')[:12]}, {(self.size or 0) / 1e6:,.0f} MB"
        return f"{self.model.name}: {self.model.address}: {state}; licence: {self.licence}"


def check_published(models: Sequence[PublishedModel] | None = None) -> list[PublishedCheck]:
    """
    Asks the Hub (and, for files elsewhere, their server) for each row of the registry; downloads no weights.

    Args:
        models: rows to ask for; by default all of `MODELS`.

    Returns:
        A [`PublishedCheck`] for each; those with a `problem` are missing, moved or out of reach.
    """
    return [_check(model) for model in (models if models is not None else MODELS.values())]


def _check(model: PublishedModel) -> PublishedCheck:
    from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url

    try:
        if not model.repo:
            answer = get_session().head(model.url, timeout=30)
            answer.raise_for_status()
            return PublishedCheck(model, None, int(answer.headers.get("Content-Length", 0)), "not stated")
        card = HfApi().model_info(model.repo).card_data
        licence = (card and card.get("license")) or "not stated"
        file = model.file or "config.json"
        try:
            metadata = get_hf_file_metadata(hf_hub_url(model.repo, file, revision=model.revision))
        except _hub_errors():
            commit = _revision_in_history(model)
            return PublishedCheck(model, commit, None, licence, f"moved: it is at commit {commit}")
        return PublishedCheck(model, metadata.commit_hash, metadata.size, licence)
    except ValueError as error:
        return PublishedCheck(model, None, None, "not stated", f"missing ({error})")
    except _hub_errors() as error:
        return PublishedCheck(model, None, None, "not stated", f"not reached ({_reason(error)})")


def label_models(sources: Sequence[ModelSource]) -> list[str]:
    """The registry's names; for others the folders' names, with as many parent folders as it takes to tell them apart."""
    parts = [_telling_parts(Path(source.path).absolute().parts) for source in sources]
    if len(set(parts)) < len(parts):
        raise ValueError("the same model is given twice with --model.")
    named = [source.label for source in sources]
    depth = 1
    while True:
        labels = [name or "/".join(folders[-depth:]) for name, folders in zip(named, parts, strict=True)]
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
