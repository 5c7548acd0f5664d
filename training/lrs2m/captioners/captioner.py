"""What a captioner is asked and what it answers, whichever engine is behind it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modeling_lrsclip.files.hashing import json_sha256

from ..recipe import CaptionerConfig
from ..sources.images import Picture


class NoAnswer(Exception):
    """A request that stays without an answer; the row is set aside with this reason."""


class CaptionerDown(ValueError):
    """A captioner that cannot answer any request, such as one whose key is refused; the build stops."""


@dataclass(frozen=True)
class Sampling:
    temperature: float  # 0: the likeliest token each time
    top_p: float
    max_tokens: int  # of the captioner's tokenizer
    seed: int

    def settings(self) -> dict[str, float | int]:
        return vars(self)


@dataclass(frozen=True)
class Request:
    system: str
    user: str
    picture: Picture | None
    sampling: Sampling

    def key(self, identity: str) -> str:
        """SHA-256 of all that decides the answer, which a restart so finds again; `identity` is the captioner's."""
        content = [
            identity,
            self.system,
            self.user,
            self.picture.sha256 if self.picture else None,
            self.sampling.settings(),
        ]
        return json_sha256(content)


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool  # the captioner ended by itself, not at max_tokens


class Captioner(Protocol):
    id: str  # stored with every row; never holds a path of this machine
    identity: str  # all of it that decides an answer

    async def ask(self, request: Request) -> Answer:
        """Raises [`NoAnswer`] for this request, [`CaptionerDown`] for all."""

    async def close(self) -> None: ...


def captioner_id(config: CaptionerConfig) -> str:
    """`Qwen/Qwen2-VL-7B-Instruct` or, of a local folder, its name."""
    return Path(config.model).name if Path(config.model).expanduser().is_dir() else config.model


def captioner_identity(config: CaptionerConfig) -> str:
    """All of a captioner, but for what a request holds, that decides an answer: answers of another one are not its own."""
    return json.dumps([config.model, config.revision, config.dtype, config.max_image_side, config.extra])


def build_captioner(config: CaptionerConfig, settle: Callable[[], None]) -> Captioner:
    """The captioner of a recipe; `settle` is called by one that waits for a batch to fill ([`Gate`])."""
    if config.kind == "openai":
        from .openai_compatible import OpenAICaptioner

        return OpenAICaptioner(config)
    from .transformers_model import TransformersCaptioner

    return TransformersCaptioner(config, settle)


class Gate:
    """
    When batches go: as soon as every row that is worked on waits for a batch and no other may come in. Batches so
    depend on the rows alone, not on the clock.
    """

    def __init__(self) -> None:
        self.rows = 0  # worked on
        self.full = False  # no other row may come in before one is done
        self.captioners: list = []  # those that gather batches

    def settle(self) -> None:
        waiting = sum(len(captioner.waiting) for captioner in self.captioners)
        if self.full and waiting and waiting == self.rows:
            max(self.captioners, key=lambda captioner: len(captioner.waiting)).release()
