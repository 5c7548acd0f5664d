"""
A folder with what goes to the Hub, and the proof that it works without this project.

Model, processor, tokenizer and code are those of the checkpoint; beside them lie the card, results.json, run.json,
evaluate_checkpoint.py and SHA256SUMS. Paths of this machine do not travel.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import CLIPModel
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_lrsclip
from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.conversion import convert
from modeling_lrsclip.files.atomic import replace_json
from modeling_lrsclip.files.hashing import file_sha256

from .build_card import RECORD, build_card, read_beside
from .checkpoint import INDEX, WEIGHTS, read_checkpoint
from .redaction import command_for, without_paths
from .result_tables import select_model


RESULTS, CARD, SUMS = "results.json", "README.md", "SHA256SUMS"
EVALUATE, CLEAN_PROCESS = (Path(__file__).with_name(name) for name in ("evaluate_checkpoint.py", "clean_process.py"))
PACKAGE = Path(modeling_lrsclip.__file__).parent
SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
PLAIN_CLIP_TEMPLATE = Path(__file__).with_name("plain_clip_card_template.md")
CONVERSION = "conversion.json"  # what modeling_lrsclip.convert decided
TOLERANCE = 1e-5  # of unit embeddings: another process may place its tensors otherwise, which costs the last bits
PROBE = ["A grey runway; four white aeroplanes wait at its end, \u201cready\u201d &amp; fuelled. " * 4, "a lake"]

# What an earlier push may have left on a repository, and would be read beside the new files, or would be untrue.
OWN = (
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|pytorch_model.*\.(bin|bin\.index\.json)|tf_model\.h5|flax_model\.msgpack"
    r"|\w+_lrsclip\.py|position_stretching\.py|evaluate_checkpoint\.py"
)
OWN_NAMES = (*SETTINGS, *TOKENIZER, CONVERSION, RESULTS, RECORD, SUMS)


class NotVerified(Exception):
    """The staged folder does not do what the checkpoint does, so that nothing is sent."""

    exit_status = 4

    def __str__(self) -> str:
        return f"{super().__str__()} Nothing was sent."


@dataclass(frozen=True)
class Staged:
    folder: Path
    card: ModelCard
    sizes: dict[str, int]  # bytes by file name

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def stage(
    checkpoint: Path,
    folder: Path,
    repo_id: str,
    results: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    trust_checkpoint_code: bool = False,
    **card_options: Any,
) -> Staged:
    """
    Fills `folder`, which must be empty.

    Args:
        checkpoint: model folder; one of LRSCLIP without its code, or of CLIP, is saved anew with it.
        results: content of results.json of `evaluation.run`; None: the card says "not yet measured here".
        training: content of run.json; default that in `checkpoint`, if it is there.
        trust_checkpoint_code: [`verify`] runs the code beside the weights; other code than this package's is staged
            with this only.
        card_options: `published`, `license_id`, `plain_repo` of [`build_card`].

    Returns:
        What was staged, for [`verify`] and the push.

    Raises:
        `ValueError`: as [`build_card`]; for a folder without processor or tokenizer, for code beside the weights that
            is not this package's, and for a link to a file outside the folder.
    """
    for name in (*SETTINGS, *TOKENIZER, CONVERSION, RECORD, WEIGHTS, INDEX):
        if (checkpoint / name).is_symlink():
            _check_link(checkpoint, name)
    source = checkpoint if _complete(checkpoint) else _with_code(checkpoint, folder.with_name(f"{folder.name}-saved"))
    training = training or read_beside(checkpoint, RECORD)
    card = build_card(source, results, training, repo_id, **card_options)  # also finds what is wrong with the weights
    code = _code_files(source)
    if not trust_checkpoint_code:
        _check_code(source, code)
    for name in [*_weight_files(source), *code, *SETTINGS, *TOKENIZER, CONVERSION]:
        if (source / name).is_file():
            _check_link(source, name)
            _place(source / name, folder / name)
    for needed in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise ValueError(f"{checkpoint} holds no {needed}; save its processor there: processor.save_pretrained.")
    for name in (*SETTINGS, CONVERSION):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            if without_paths(settings) != settings:
                replace_json(folder / name, without_paths(settings))
    if training:
        replace_json(folder / RECORD, without_paths(training))
    if results is not None:
        public = public_results(results, read_checkpoint(source).weights_sha256, source, repo_id)
        replace_json(folder / RESULTS, public)
        shutil.copyfile(EVALUATE, folder / EVALUATE.name)
        if any(result["task"] in ("zcrl", "zcrs") for result in public["results"]):
            card.text += (
                "\n\n`python evaluate_checkpoint.py --data DATA`, in a download of this repository and with nothing of "
                "the project,\ncompares the files with `SHA256SUMS`, measures retrieval again on the same data and "
                "compares with `results.json`.\n"
            )
    return _finish(folder, card)


def stage_plain_clip(staged: Staged, folder: Path, repo_id: str, sibling: str) -> Staged:
    """
    Fills `folder`, which must be empty, with the same weights as a stock CLIP, and a card that points to its sibling.

    Args:
        staged: the LRSCLIP, of [`stage`].
        folder: for the stock CLIP.
        repo_id: of the stock CLIP.
        sibling: repository of the LRSCLIP.

    Returns:
        [`Staged`]: its card has the sibling's licence and tags, and no results: those are the sibling's.
    """
    convert(staged.folder, folder, "plain-clip")
    known = staged.card.data
    data = ModelCardData(
        language="en",
        license=known.license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*(tag for tag in known.tags if tag != LRSCLIPConfig.model_type), "sentence-transformers"],
        base_model=sibling,
    )
    positions = json.loads((folder / "config.json").read_text())["text_config"]["max_position_embeddings"]
    shown = {"title": repo_id.split("/")[-1], "address": repo_id, "sibling": sibling, "positions": positions}
    return _finish(folder, ModelCard.from_template(data, template_path=str(PLAIN_CLIP_TEMPLATE), **shown))


def _finish(folder: Path, card: ModelCard) -> Staged:
    """Sums over what is there, and the card, which is not among them: its words may be changed on the Hub."""
    sums = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    card.save(folder / CARD)
    return Staged(folder, card, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})


def _auto_modules(checkpoint: Path) -> set[str] | None:
    """Modules that the folder's auto_map names; None where there is no auto_map, or one that points elsewhere."""
    named = set()
    for name in SETTINGS:
        path = checkpoint / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for blocks in (settings, settings.get("image_processor") or {}):
            for value in (blocks.get("auto_map") or {}).values():
                classes = [entry for entry in (value if isinstance(value, list) else [value]) if entry]
                if any("--" in entry for entry in classes):
                    return None
                named |= {entry.split(".")[0] for entry in classes}
        if name == "config.json" and not named:
            return None
    return named


def _complete(checkpoint: Path) -> bool:
    """Whether the folder brings its code."""
    modules = _auto_modules(checkpoint) if (checkpoint / "config.json").is_file() else set()
    return modules is not None and all((checkpoint / f"{module}.py").is_file() for module in modules)


def _code_files(checkpoint: Path) -> list[str]:
    files = [checkpoint / f"{module}.py" for module in sorted(_auto_modules(checkpoint) or ())]
    files += [Path(path) for file in files for path in get_relative_import_files(file)]
    return sorted({path.name for path in files})


def _check_code(checkpoint: Path, names: list[str]) -> None:
    """Raise `ValueError` for code that is not this package's, byte for byte: a stranger's would be run to verify it."""
    for name in names:
        ours = PACKAGE / name
        if not ours.is_file() or ours.read_bytes() != (checkpoint / name).read_bytes():
            raise ValueError(
                f"{checkpoint / name} is not the code of this package, and pushing runs it; save the model again from "
                "here, or, if you know who wrote it, allow that with --trust-checkpoint-code."
            )


def _check_link(checkpoint: Path, name: str) -> None:
    """Raise `ValueError` for a link out of the folder; those of a Hub download lead to the blobs beside its snapshots."""
    target = (checkpoint / name).resolve()
    allowed = [checkpoint.resolve()]
    if checkpoint.resolve().parent.name == "snapshots":
        allowed.append(checkpoint.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        outside = f"{target}, outside of the folder"
        raise ValueError(f"{checkpoint / name} is a link to {outside}; put the file itself there.")


def _with_code(checkpoint: Path, folder: Path) -> Path:
    """The same weights saved anew, with the code; of a CLIP folder as the LRSCLIP that it is without stretching."""
    if _model_type(checkpoint) != LRSCLIPConfig.model_type:
        convert(checkpoint, folder, tokenizer=checkpoint)
        return folder
    read_checkpoint(checkpoint)  # one sentence for weights that are missing or damaged
    LRSCLIPModel.from_pretrained(checkpoint).save_pretrained(folder)
    LRSCLIPProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def _model_type(checkpoint: Path) -> str | None:
    return json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")


def _weight_files(checkpoint: Path) -> list[str]:
    if not (checkpoint / INDEX).is_file():
        return [WEIGHTS]
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    return [INDEX, *sorted(set(index["weight_map"].values()))]


def _place(source: Path, target: Path) -> None:
    """Put a file in place: weights by a link where that is possible, what is rewritten later by a copy."""
    if source.suffix == ".safetensors":
        try:
            os.symlink(source.resolve(), target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def public_results(document: dict[str, Any], weights_sha256: str, folder: Path, repo_id: str) -> dict[str, Any]:
    """
    The part of results.json that is about these weights, under the repository's name; without the example captions,
    which are somebody's data set.

    Args:
        document: content of `results.json`.
        weights_sha256: hash of the weights.
        folder: theirs, for the error.
        repo_id: `owner/name`.

    Returns:
        The document to publish.
    """
    measured, model_results = select_model(document, weights_sha256, folder)
    kept = [{name: value for name, value in result.items() if name != "examples"} for result in model_results]
    if "command" in document:
        document = document | {"command": command_for(document["command"], repo_id)}
    return without_paths(document | {"models": [measured | {"path": repo_id}], "results": kept})


# ---------------------------------------------------------------------------------------------------------- verification


def verify(checkpoint: Path, staged: Staged) -> dict[str, float]:
    """
    Loads the staged folder in a process that cannot import this package, and compares with the checkpoint as the
    package reads it. The card is read again too.

    Returns:
        `dict`: largest difference by name: token ids, pixel values, text and image embeddings.

    Raises:
        [`NotVerified`]: one sentence for a folder that does not load there, other weights, or other outputs.
    """
    card = ModelCard.load(staged.folder / CARD)
    if (card.text, card.data.to_dict()) != (staged.card.text, staged.card.data.to_dict()):
        raise NotVerified("the card that was written is read as another one; this is a fault of its template.")
    of_clip = _model_type(checkpoint) != LRSCLIPConfig.model_type  # modeling_lrsclip.convert has compared its weights
    plain = _model_type(staged.folder) != LRSCLIPConfig.model_type  # likewise
    same_class = not of_clip and not plain
    if same_class and read_checkpoint(staged.folder).weights_sha256 != read_checkpoint(checkpoint).weights_sha256:
        raise NotVerified(f"the staged weights are not those of {checkpoint}; was it written to meanwhile? Run again.")
    work = staged.folder.with_name(f"{staged.folder.name}-verified")
    work.mkdir()
    (work / "texts.json").write_text(json.dumps(PROBE))
    Image.linear_gradient("L").resize((300, 260)).convert("RGB").rotate(30).save(work / "image.png")
    apart = ("PYTHONPATH", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    environment |= {
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    files = [str(work / name) for name in ("texts.json", "image.png", "outputs.pt")]
    code = "none" if plain else "remote"
    command = [sys.executable, str(CLEAN_PROCESS), str(staged.folder.resolve()), *files, code]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise NotVerified(f"the staged copy of {checkpoint} does not load without this package: {reason}")
    reference = (CLIPModel if of_clip else LRSCLIPModel).from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = LRSCLIPProcessor.from_pretrained(staged.folder if of_clip and not plain else checkpoint)
    expected = _outputs(reference, processor, work / "image.png")
    return compare_outputs(torch.load(work / "outputs.pt"), expected, checkpoint)


def compare_outputs(
    outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], checkpoint: Path
) -> dict[str, float]:
    """
    Largest difference between what a staged copy gives and what its checkpoint gives.

    Args:
        outputs: of the copy, by name; embeddings are unit vectors.
        expected: those of the checkpoint.
        checkpoint: for the error.

    Returns:
        The difference by name.

    Raises:
        [`NotVerified`]: for other token ids, and for anything else that differs by more than [`TOLERANCE`].
    """
    differences = {}
    for name, tensor in expected.items():
        same = outputs[name].shape == tensor.shape
        differences[name] = (outputs[name] - tensor).abs().max().item() if same else float("inf")
        if not differences[name] <= (0 if name == "token ids" else TOLERANCE):
            raise NotVerified(
                f"{name} of the staged copy differ from those of {checkpoint} by {differences[name]:.1e} (allowed: "
                f"{TOLERANCE:.0e}); the code beside the weights is another than this clone's: save it again from here."
            )
    return differences


def _outputs(model: CLIPModel, processor: LRSCLIPProcessor, image: Path) -> dict[str, torch.Tensor]:
    """Token ids, pixels and embeddings that `clean_process.py` writes, computed by the package."""
    inputs = processor(text=PROBE, images=Image.open(image), return_tensors="pt")
    with torch.inference_mode():
        outputs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    return {
        "token ids": inputs["input_ids"],
        "pixel values": inputs["pixel_values"],
        "text embeddings": outputs.text_embeds,
        "image embeddings": outputs.image_embeds,
    }
