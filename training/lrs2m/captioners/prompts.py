"""Prompts: files with a name, a version and a hash, so that a row tells which words made its caption."""

import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modeling_lrsclip.files.configuration import read_yaml
from modeling_lrsclip.files.hashing import json_sha256

from ..recipe import Recipe, TextConfig, resolve


FOLDER = Path(__file__).parents[1] / "prompts"


@dataclass(frozen=True)
class Prompt:
    name: str
    version: int
    system: str
    user: str  # with places such as {short_text}
    image: bool  # whether the captioner sees the image

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides what a captioner reads."""
        return json_sha256([self.name, self.version, self.system, self.user, self.image])

    @cached_property
    def places(self) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(self.user) if field}

    @cached_property
    def instructions(self) -> str:
        """The words of both turns without what is filled in."""
        return " ".join([self.system, *(words for words, *_ in string.Formatter().parse(self.user))])

    def fill(self, values: dict[str, str]) -> str:
        """The user's words with `values` in their places."""
        return self.user.format(**{name: values[name] for name in self.places})


Prompts = dict[str, dict[str, Prompt]]  # by source and text ("long", "short")


def load_prompts(recipe: Recipe, root: Path) -> Prompts:
    """
    The prompts of all sources.

    Raises:
        `ValueError`: for one that is not there, or has a place that nothing fills on its source's route.
    """
    prompts: Prompts = {}
    for source in recipe.sources:
        prompts[source.name] = {}
        known = {"class_name", *source.fields, *source.read.columns, *(["anchors"] if source.labels else [])}
        shorts = [] if source.short.captioner else ["short_text", "short_texts"]
        for which, text, others in (("long", source.long, shorts), ("short", source.short, ["long_text"])):
            if text.prompt is None:
                continue
            prompt = prompts[source.name][which] = load_prompt(text, root)
            if missing := prompt.places - known - set(others):
                raise ValueError(
                    f"prompt {text.prompt} of source {source.name} has the place {{{min(missing)}}}, which nothing fills "
                    f"on route {source.route}; give it in fields, or take another prompt."
                )
    return prompts


def load_prompt(text: TextConfig, root: Path) -> Prompt:
    """
    The prompt that a text of a recipe names: `name@version` of this package, or a YAML file.

    Raises:
        `ValueError`: for a prompt that is not there, of another version, or with fields missing.
    """
    assert text.prompt is not None
    if text.prompt.endswith((".yaml", ".yml")):
        path, wanted = resolve(text.prompt, root), None
    else:
        name, _, wanted = text.prompt.partition("@")
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(_read(file).id for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"prompt {text.prompt} does not exist; there are {known}, or give a YAML file.")
    prompt = _read(path)
    if wanted is not None and wanted != str(prompt.version):
        raise ValueError(
            f"prompt {text.prompt} was asked for and {prompt.id} is here; name {prompt.id} in the recipe."
        )
    return prompt


def _read(path: Path) -> Prompt:
    try:
        prompt = Prompt(**read_yaml(path))
        prompt.places  # noqa: B018  malformed braces show here
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a prompt of name, version, image, system and user: {error}") from error
    return prompt
