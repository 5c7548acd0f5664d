"""
Fills a model card from a checkpoint, what was measured of it, and how it was trained.

    python model_cards/build_card.py --checkpoint runs/mine/final --results results/results.json --repo you/mine
    python model_cards/build_card.py --published lrsclip-vit-b-16 --output model_cards/lrsclip_vit_b_16.md

A card shows no figure that is not in results.json, in the training record or in the paper's tables.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id


if not __package__:  # run as a file: siblings and modeling_lrsclip are found from the clone's root
    sys.path.insert(0, str(Path(__file__).parents[1]))

from model_cards.redaction import command_for, without_paths
from model_cards.result_tables import eval_results, paper_tables, results_section, select_model, tokens_section
from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.atomic import make_folder, replacing


if TYPE_CHECKING:
    from model_cards.checkpoint import ModelFacts
from modeling_lrsclip.files.documents import read_json, without_markup


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CONVERSION = "conversion.json"  # what modeling_lrsclip.convert leaves there
RECORD = "run.json"  # what training.train leaves beside the weights
TAGS = ["remote-sensing", "clip", "lrsclip", "long-text", "image-text-retrieval"]
CODE_REPO = "MitsuiChen14/DGTRS"  # the authors', on GitHub
UNKNOWN = "unknown"  # the Hub's identifier of a licence that is not stated
RECORDED = {"data", "steps", "weights", "config", "processes", "device", "precision", "seconds", "versions"}


def build_card(
    checkpoint: Path | None,
    results: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    repo_id: str | None = None,
    *,
    published: str | None = None,
    license_id: str = UNKNOWN,
    plain_repo: str | None = None,
) -> ModelCard:
    """
    The card of a checkpoint, or of published weights that are not at hand.

    Args:
        checkpoint: model folder; None only with `published`.
        results: content of the results.json of `evaluation.run`; the results of these very weights are taken from it,
            recognised by their hash. None: every table says "not yet measured here".
        training: content of the run.json of `training.train`; by default that in `checkpoint`, if it is there.
        repo_id: `owner/name` on the Hub, for the lines of use; default the folder's name.
        published: key of `published.json`, for weights converted from the authors' files.
        license_id: of the weights, as the Hub spells it.
        plain_repo: `owner/name` of the same weights as a stock CLIP, if they are on the Hub too.

    Returns:
        `ModelCard`: with validated metadata; `.save(path)` writes it.

    Raises:
        `ValueError`: one sentence for a folder that is no LRSCLIP checkpoint, results or a training record of other
            weights or of another format, a malformed repo id, an unknown published model.
    """
    if checkpoint is None and published is None:
        raise ValueError("a card needs a checkpoint folder or the name of a published model.")
    if repo_id is not None:
        validate_repo_id(repo_id)
    checkpoint = checkpoint and Path(checkpoint)
    from model_cards.checkpoint import published_model, read_checkpoint  # torch, which --help does without

    description, facts = published_model(published) if published else (None, None)
    conversion = None
    if checkpoint is not None:
        facts = read_checkpoint(checkpoint)
        conversion, beside = (read_beside(checkpoint, name) for name in (CONVERSION, RECORD))
        training = training or beside
    _check_origin(checkpoint, facts, conversion, training, description)
    measured, model_results = {}, []
    if results is not None:
        if checkpoint is None:
            raise ValueError("results belong to weights; give the checkpoint folder that was measured.")
        measured, model_results = select_model(results, facts.weights_sha256, checkpoint)
        for index, result in enumerate(model_results):
            source, trained_on = result.get("source"), [data["name"] for data in _trained_on(training)]
            # Of a folder, the evaluation and the training may have read different parts.
            files = [os.path.abspath(name) for name in trained_on if Path(name).suffix]
            if isinstance(source, str) and os.path.abspath(source) in files:
                model_results[index] = result | {"seen": "it was trained on this very file"}
    address = repo_id or (_folder_name(checkpoint, address=True) if checkpoint else published)
    title = repo_id.split("/")[-1] if repo_id else _folder_name(checkpoint) if checkpoint else published
    data = card_data(title, model_results, training, description, license_id)
    paper_model = published or next((r["paper_model"] for r in model_results if "paper_model" in r), None)
    # What others wrote goes into the body as plain text; the metadata above are YAML, which quotes it.
    shown = without_markup(model_results)
    address = re.sub(r"[\s\"`]+", "-", address)  # it stands in lines of Python and of the shell
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=without_markup(description["name"] if description else title),
        facts=facts,
        conversion=without_markup(without_paths(conversion)),
        text=facts.config.text_config,
        vision=facts.config.vision_config,
        address=address,
        plain_repo=plain_repo,
        results_section=results_section(shown, paper_model),
        tokens_section=tokens_section(shown),
        paper_name=paper_tables()["names"].get(paper_model),
        commands=_commands(address, description, training, results),
        versions_section=_versions(*map(without_markup, (results, measured, model_results, training))),
        arxiv=paper_tables()["source"]["arxiv"],
        second=paper_tables()["sources"]["v2"],
        **_origin(description, without_markup(training), training and training["config"]),
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", card.content))


def card_data(
    name: str,
    results: Sequence[dict[str, Any]],
    training: dict[str, Any] | None,
    description: dict[str, Any] | None,
    license_id: str,
) -> ModelCardData:
    """
    The card's metadata; what is not known is left out.

    Args:
        name: of the model.
        results: of `results.json`, those of this model.
        training: content of `run.json`; None: not known.
        description: of the model in `results.json`; None: not measured.
        license_id: as the Hub names it.

    Returns:
        What stands in the card's head.
    """
    base, datasets = description and description["base_model"], None
    if training and training["init"] and training["init"]["kind"] == "hub":
        base = training["init"]["name"]
    if training and training["data"]["kind"] == "hub":
        datasets = [data["name"] for data in _trained_on(training)]
    measured, index = [name for result in results for name in result["metrics"]], eval_results(results)
    metrics = dict.fromkeys("recall" if "R@" in name or name == "mR" else name for name in measured)
    return ModelCardData(
        language="en",
        license=license_id,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=TAGS,
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=datasets,
        metrics=list(metrics) or None,
        model_name=name if index else None,  # of the model-index
        eval_results=index or None,
    )


# ---------------------------------------------------------------------------------------------------------------- origin


def read_beside(checkpoint: Path, name: str) -> dict[str, Any] | None:
    """Return a record that lies beside the weights, if there is one and it says anything."""
    path = checkpoint / name
    return (read_json(path, "remove it, or put back what was written there") or None) if path.is_file() else None


def _check_origin(
    checkpoint: Path | None,
    facts: "ModelFacts",
    conversion: dict[str, Any] | None,
    training: dict[str, Any] | None,
    description: dict[str, Any] | None,
) -> None:
    """Raise `ValueError` where what is said of the weights' origin is of other weights."""
    if description and training:
        raise ValueError(
            f"{description['key']} was trained by its authors, but a training record is given; leave one of them out."
        )
    if checkpoint is not None and description and (conversion or {}).get("source") != description["weights_file"]:
        raise ValueError(
            f"{checkpoint} is no conversion of {description['weights_file']} by its {CONVERSION}; --published is "
            "for the authors' own weights, converted by modeling_lrsclip.convert."
        )
    if training and (not isinstance(training, dict) or not training.keys() >= RECORDED):
        raise ValueError("the training record lacks what run.json of training.train holds; give that file.")
    if training and training["weights"]["sha256"] != facts.weights_sha256:
        raise ValueError(
            f"the training record is that of other weights ({training['weights']['sha256'][:12]}) than those in "
            f"{checkpoint} ({facts.weights_sha256[:12]}); give the run.json that lies beside them."
        )


def _trained_on(training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The data sets of a training record, which names one or lists several."""
    return training["data"].get("sources", [training["data"]]) if training else []


def _origin(
    description: dict[str, Any] | None, training: dict[str, Any] | None, whole_config: dict[str, Any] | None
) -> dict[str, Any]:
    """The template's variables on where the weights come from."""
    variables: dict[str, Any] = {"published": description, "training": training}
    if description:
        lrs2m, recipe = paper_tables()["lrs2m"], paper_tables()["recipe"]
        variables |= {
            "base_name": _hub_link(description["base_model"]),
            "code_repo": CODE_REPO,
            "lrs2m": lrs2m,
            "pairs_of_table_1": sum(row[0] for row in lrs2m["rows"].values()),
            "recipe": recipe,
            "short_weight": round(1 - recipe["long_weight"], 6),
        }
    elif training:
        config, init = training["config"], training["init"]
        started_from = f"`{without_paths(init['name'])}`" if init else "random weights"
        if init and init["kind"] == "hub":
            started_from = _hub_link(init["name"])
        variables |= {
            "captions": " and ".join(f"`{name}`" for name in training["data"]["captions"]),
            "config": config,
            "config_yaml": _fenced(yaml.safe_dump(without_paths(whole_config), sort_keys=False, width=110).strip()),
            "data_name": without_paths(training["data"]["name"]),
            "init_data_name": training["init_run"] and without_paths(training["init_run"]["data"]["name"]),
            "weights_of_losses": _weights_of_losses(config["loss"]["long_weight"]),
            "started_from": started_from,
        }
    return variables


def _hub_link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _fenced(code: str) -> str:
    """Code that does not end the fence it stands in."""
    return code.replace("```", "'''")


def _weights_of_losses(long_weight: float | dict[str, float]) -> str:
    """The weights of the two losses in words; of a curriculum from where to where."""
    if isinstance(long_weight, dict):
        words = "{start:g} for the long text (and the rest for the short one) in the first {start_share:g} % of the "
        words += "steps, {end:g} in the last {end_share:g} %, half a cosine between"
        percent = {name: 100 * long_weight[name] for name in ("start_share", "end_share")}
        return words.format(**long_weight | percent)
    return f"{long_weight} for the long and {round(1 - long_weight, 6)} for the short text"


def _folder_name(checkpoint: Path, address: bool = False) -> str:
    """`runs/mine/final` is the model `mine`; as an address, from which it is loaded, the folder itself."""
    path = checkpoint.absolute()
    return path.parent.name if path.name in ("final", "best") and not address else path.name


# ------------------------------------------------------------------------------------------------------------- reproduce


def _commands(
    address: str, description: dict[str, Any] | None, training: dict[str, Any] | None, results: dict[str, Any] | None
) -> list[str]:
    """The shell lines that make the weights and measure them."""
    commands = []
    if description:
        commands.append(f"python -m modeling_lrsclip.convert {description['weights_file']} {address}")
    if training:
        commands.append("accelerate launch -m training.train --config config.yaml")
    if results and "command" in results:
        return [*commands, _fenced(" ".join(command_for(results["command"], address).split()))]
    commands.append(f"python -m evaluation.run --model {address} --tasks all --data DATA --output results")
    card = f"python model_cards/build_card.py --checkpoint {address} --results results/results.json"
    return [*commands, card + (f" --published {description['key']}" if description else "")]


def _versions(
    results: dict[str, Any] | None,
    measured: dict[str, Any],
    model_results: Sequence[dict[str, Any]],
    training: dict[str, Any] | None,
) -> str:
    lines = []
    if training:
        lines.append(f"- Trained with {_listed(training['versions'])}.")
    if results:
        versions = {"python": results["environment"]["python"]} | results["environment"]["versions"]
        lines.append(f"- Measured with {_listed(versions)}, in {measured['dtype']} on {measured['device']}.")
    for result in model_results:
        hashes = {noun: result.get(f"{noun}_sha256") for noun in ("images", "texts", "labels")}
        if shown := [f"{noun} `{sha256[:16]}`" for noun, sha256 in hashes.items() if sha256]:
            lines.append(f"- {result['dataset']} for {result['task']}, SHA-256: {', '.join(shown)}.")
    return "\n".join(dict.fromkeys(lines))


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


# --------------------------------------------------------------------------------------------------------------- command


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    parser = command_parser("python model_cards/build_card.py", "Builds a model card.")
    parser.add_argument("--checkpoint", type=Path, help="model folder as save_pretrained writes it")
    parser.add_argument("--results", type=Path, help="results.json of evaluation.run on this checkpoint")
    parser.add_argument("--training", type=Path, help="run.json of training.train (the one beside the weights)")
    parser.add_argument("--repo", help="owner/name on the Hub, for the lines of use")
    parser.add_argument("--published", help="for weights converted from the authors' files, such as lrsclip-vit-b-16")
    parser.add_argument("--license", default=UNKNOWN, help="of the weights, as the Hub spells it (unknown)")
    parser.add_argument("--output", type=Path, help="file to write (README.md in the checkpoint folder)")
    options = parser.parse_args(arguments)
    advice = "give results.json of evaluation.run, run.json of training.train"
    results, training = (path and read_json(path, advice) for path in (options.results, options.training))
    chosen = {"published": options.published, "license_id": options.license}
    card = build_card(options.checkpoint, results, training, options.repo, **chosen)
    output = options.output or (options.checkpoint and options.checkpoint / "README.md")
    if output is None:
        raise ValueError("--output FILE is needed where no --checkpoint is given.")
    with replacing(make_folder(output.parent) / output.name) as growing:
        card.save(growing)
    print(output)


if __name__ == "__main__":
    sys.exit(main())
