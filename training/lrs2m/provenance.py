"""What of a recipe decides the rows, and what of it may be seen by everybody."""

from pathlib import Path
from typing import Any

from modeling_lrsclip.files.configuration import plain_values
from modeling_lrsclip.files.hashing import json_sha256

from .captioners.prompts import Prompt, load_prompt
from .recipe import Recipe, SourceConfig, TextConfig
from .routes import missing_places


# What may change between two runs of one build: it decides how fast a row comes, or when to stop, not what is in it.
FREE = ("max_skipped_fraction", "max_failures_in_a_row", "max_failed_fraction", "lookahead")
FREE_OF_CAPTIONER = (
    *("base_url", "api_key_variable", "concurrency", "timeout", "tries"),
    *("batch_size", "device_map"),
)
LOCAL = ("path", "images", "against", "tokenizer", "model", "prompt")  # fields that may hold a path of this machine

Prompts = dict[str, dict[str, Prompt]]  # by source and text ("long", "short")


def load_prompts(recipe: Recipe, root: Path) -> Prompts:
    """
    The prompts of all sources.

    Raises:
        `ValueError`: for one that is not there, or has a place that nothing fills on its source's route.
    """
    return {source.name: _prompts_of(source, root) for source in recipe.sources}


def _prompts_of(source: SourceConfig, root: Path) -> dict[str, Prompt]:
    prompts = {}
    for which in ("long", "short"):
        text: TextConfig = getattr(source, which)
        if text.prompt is None:
            continue
        prompts[which] = load_prompt(text, root)
        if missing := missing_places(source, which, prompts[which]):
            raise ValueError(
                f"prompt {text.prompt} of source {source.name} has the place {{{min(missing)}}}, which nothing fills on "
                f"route {source.route}; give it in fields, or take another prompt."
            )
    return prompts


def recipe_hash(recipe: Recipe, prompts: Prompts) -> str:
    """SHA-256 over what of a recipe and its prompts decides the rows."""
    values = plain_values(recipe)
    for name in FREE:
        values.pop(name)
    for captioner in values["captioners"].values():
        for name in FREE_OF_CAPTIONER:
            captioner.pop(name)
    words = {source: {which: prompt.hash for which, prompt in own.items()} for source, own in prompts.items()}
    return json_sha256([values, words], sort_keys=True)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's paths and addresses: of a path its last part."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(key, one) for key, one in value.items() if key not in ("base_url", "api_key_variable")}
        if isinstance(value, list):
            return [shown(name, one) for one in value]
        hidden = (
            isinstance(value, str) and name in LOCAL and (value[:1] in ("/", "~", "$", ".") or Path(value).exists())
        )
        return Path(value).name if hidden else value

    return shown("", plain_values(recipe))
