"""The four routes: how a record gets its long and its short text (paper, Section III and appendix A)."""

import asyncio
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modeling_lrsclip.files.tables import garbled

from .captioners.captioner import AnswerStore, Captioner, NoAnswer, Request, Sampling
from .captioners.prompts import Prompt
from .checks.candidate import Candidate, Limits
from .checks.cleaning import clean_answer
from .checks.named_checks import judge
from .data_row import GIVEN, Record
from .recipe import Recipe, SourceConfig, TextConfig
from .sources.anchors import Label, anchor_text, anchors_json, labels_caption
from .sources.images import Picture, Skip


TEMPLATE = "template"


@dataclass
class Item:
    """A record whose image was read and whose labels are known."""

    record: Record
    picture: Picture
    labels: list[Label] = field(default_factory=list)


@dataclass
class Text:
    text: str
    captioner: str = GIVEN
    prompt: Prompt | None = None
    sampling: dict[str, Any] | None = None
    tokens: int | None = None  # CLIP's, where its check has counted them
    refused: list[str] = field(default_factory=list)  # why the answers before it could not be used
    warnings: list[str] = field(default_factory=list)  # checks that found a fault for which it is kept nevertheless


class Failed(Exception):
    """A text that no attempt brought; `attempts` tell the seed, the reason and the beginning of every answer."""

    def __init__(self, text: str, reason: str, attempts: list[dict[str, Any]]):
        super().__init__(reason)
        self.text, self.reason, self.attempts = text, reason, attempts


@dataclass
class Writer:
    """
    Writes the texts of one source's rows.

    Args:
        captioners: the recipe's, by name.
        prompts: of the long and of the short text, where a captioner writes it.
        count_tokens: CLIP's tokens of a text.
        choose: picks among candidate captions of an image, as an index; None where the recipe asks for none.
    """

    recipe: Recipe
    source: SourceConfig
    captioners: dict[str, Captioner]
    prompts: dict[str, Prompt]
    answers: AnswerStore
    count_tokens: Callable[[str], int]
    choose: Callable[[Any, list[str]], int] | None = None
    retries: int = 0  # how often `--retry-failed` asked for as many attempts again for texts that had none
    repeated: dict[str, int] = field(default_factory=dict)  # by record: so many of these come first for its long text

    @property
    def asks(self) -> bool:
        """Whether a captioner writes any of the source's texts."""
        return any(text.captioner for text in self.source.texts.values())

    async def texts(self, item: Item) -> tuple[Text, Text]:
        """
        The long and the short text of an item, in the order that its route asks for.

        Raises:
            [`Failed`]: when a captioner brought none that passes the checks.
            [`~training.lrs2m.sources.images.Skip`]: for a given text that is empty or garbled, or a template without its fields.
        """
        if self.source.long.captioner:
            short = None if self.source.short.captioner else self.ready_text("short", item)
            long = await self._written("long", item, short)
            return long, short or await self._written("short", item, long)
        long = self.ready_text("long", item)
        if not self.source.short.captioner:
            return long, self.ready_text("short", item)
        return long, await self._written("short", item, long)

    def anchors(self, item: Item) -> str | None:
        """The `anchors` column of a row."""
        return anchors_json(item.labels, self._anchor_text(item)) if item.labels else None

    def _anchor_text(self, item: Item) -> str:
        return anchor_text(item.labels, self.source.labels.max_positions)

    def ready_text(self, which: str, item: Item) -> Text:
        """
        A given text or one from a template.

        Args:
            which: `long` or `short`.
            item: with its record and labels.

        Returns:
            The text.

        Raises:
            [`~training.lrs2m.sources.images.Skip`]: for one that is empty or garbled, or a template without its fields.
        """
        config = self.source.texts[which]
        if config.template is None:
            text = getattr(item.record, f"{which}_text")
            if text is None or not text.strip():
                raise Skip(f"empty {which} caption", "the source has none for it")
            if garbled(text):
                raise Skip(f"garbled {which} caption", f"{text[:60]!r} is not of the encoding read.encoding says")
            return Text(" ".join(text.split()))
        if config.template == "labels":
            return Text(labels_caption(item.labels), TEMPLATE)
        from .captioners.metadata import metadata_caption

        known = {name: getattr(item.record, name) for name in ("class_name", "longitude", "latitude", "gsd", "date")}
        known = {name: value for name, value in known.items() if value is not None}
        text = metadata_caption(item.record.fields | known, config.template)
        if not text.strip():
            raise Skip(
                f"no metadata for the {which} text", f"{item.record.image_key} has none of the template's fields"
            )
        return Text(text, TEMPLATE)

    async def _written(self, which: str, item: Item, other: Text | None) -> Text:
        """A captioner's text: attempts with different seeds until as many as wanted pass the checks."""
        config = self.source.texts[which]
        captioner, prompt = self.captioners[config.captioner], self.prompts[which]
        places = self._places(item, other)
        user, picture = prompt.fill(places), item.picture if prompt.image else None
        count = functools.cache(self.count_tokens)
        known = self._known(which, item, other) | {
            "count_tokens": count,
            "instructions": prompt.instructions,
            "filled_in": " ".join(places[name] for name in prompt.places),
        }
        attempts: list[dict[str, Any]] = []
        good: list[Text] = []
        usual = config.attempts + config.candidates - 1
        begin = 0  # beyond those that brought an answer which many images share, and so was taken out
        if which == "long" and (before := self.repeated.get(item.record.id)) is not None:
            begin = usual + before * config.attempts
        for attempt in range(begin, usual + self.retries * config.attempts):
            if attempt >= usual and good:
                break
            sampling = self._sampling(config, prompt, user, item.picture.sha256, attempt)
            try:
                answer = await self.answers.ask(captioner, Request(prompt.system, user, picture, sampling))
            except NoAnswer as error:
                attempts.append({"seed": sampling.seed, "reason": str(error)})
                break
            text = clean_answer(answer.text)
            fault, warnings = judge(Candidate(text, which, finished=answer.finished, **known), self.recipe.checks)
            if fault:
                reason = {"reason": fault.check, "detail": fault.detail, "answer": answer.text[:300]}
                attempts.append({"seed": sampling.seed} | reason)
                continue
            good.append(Text(text, captioner.id, prompt, vars(sampling), count(text), warnings=warnings))
            if len(good) == config.candidates:
                break
        if not good:
            raise Failed(which, attempts[-1]["reason"], attempts)
        chosen = good[0]
        if len(good) > 1 and self.choose is not None:
            chosen = good[await asyncio.to_thread(self.choose, item.picture.image, [text.text for text in good])]
        chosen.refused = [attempt["reason"] for attempt in attempts]
        return chosen

    def _places(self, item: Item, other: Text | None) -> dict[str, str]:
        record = item.record
        shorts = record.short_texts or [record.short_text or ""]
        return {name: str(value) for name, value in record.fields.items()} | {
            **dict.fromkeys(("long_text", "short_text"), other.text if other else ""),
            "short_texts": "; ".join(f'"{text.strip()}"' for text in dict.fromkeys(shorts) if text.strip()),
            "anchors": self._anchor_text(item) if item.labels else "",
            "class_name": record.class_name or "",
        }

    def _known(self, which: str, item: Item, other: Text | None) -> dict[str, Any]:
        """Fields of a candidate beside the answer itself and its prompt."""
        limits = Limits(max_words=self.recipe.short_words)
        if which == "long":
            limits = Limits(*self.recipe.long_tokens, anchor_share=self.source.long.anchor_share)
        labels = item.labels if self.source.route == "anchor" else []
        classes = self.classes if labels else []
        return {"limits": limits, "other": other.text if other else None, "labels": labels, "classes": classes}

    @functools.cached_property
    def classes(self) -> list[str]:
        """All that the source's labels would list; a class folder lists one of several."""
        config = self.source.labels
        if config is None or config.classes or config.kind == "class_name":
            return config.classes if config else []
        return [name for name in config.names.values() if name]

    def _sampling(self, config: TextConfig, prompt: Prompt, user: str, image_sha256: str, attempt: int) -> Sampling:
        """Settings whose seed is drawn from what is asked and the attempt, so that it does not hang on a row's number."""
        about = json.dumps([self.recipe.seed, prompt.hash, user, image_sha256, attempt])
        seed = int.from_bytes(hashlib.sha256(about.encode()).digest()[:4], "big") >> 1
        settings = self.recipe.captioners[config.captioner]
        # A second attempt at temperature 0 would bring the same answer.
        warm = settings.temperature if attempt == 0 else max(settings.temperature, 0.3)
        return Sampling(warm, settings.top_p, settings.max_tokens, seed)
