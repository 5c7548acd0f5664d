"""
Second opinions on the captions of a finished data set: scores as columns, and a sheet for a person.

    python -m training.lrs2m.verify DIR --config RECIPE.yaml --output DIR2

puts into DIR2 the rows of DIR with the columns that the recipe's section `verify` asks for: similarity to the image of the long
text, the short one and every sentence, by any CLIP or LRSCLIP; and claims of the long text (objects, counts, colours,
positions) asked back as yes or no to another captioner. Rows below a threshold of the section are listed in `failed.jsonl`. An
interrupted run goes on when the same command is run again; no question is asked twice.

    python -m training.lrs2m.verify DIR --sheet 200
    python -m training.lrs2m.verify DIR --read-sheet

writes 200 rows with thumbnails into DIR/sheet for a person to fill in, and reads the share of false captions back, for the
statistics and the card.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.atomic import replace_json
from modeling_lrsclip.files.configuration import plain_values
from modeling_lrsclip.files.hashing import json_sha256
from modeling_lrsclip.published.registry import resolve as resolve_model

from .build import build_captioner
from .captioners.captioner import AnswerStore, Captioner, Gate, NoAnswer, Request, Sampling
from .captioners.prompts import Prompt, load_prompt
from .checks.candidate import split_sentences
from .checks.claims import Claim, claims_of, read_answer
from .checks.sheet import SHEET, read_sheet, write_sheet
from .data_row import SPLITS, Row
from .output import WORK, Output, Progress, load_progress, only_builder
from .recipe import Recipe, TextConfig, VerifyConfig, public_recipe, read_recipe
from .shards import count_rows, data_hash, read_manifest, read_rows
from .sources.images import Picture, read_picture
from .statistics import HAND_READ


CHUNK = 32  # rows scored together
WHOLE_TEXT = 200  # positions from which on a model reads a long text as a whole
PROMPT = "verify@1"


class Similarity:
    """
    Similarity of texts to their images.

    Args:
        model: CLIP or LRSCLIP, as `evaluation.run --model` takes it.
    """

    def __init__(self, model: str):
        import torch  # seconds, which --help does without

        from modeling_lrsclip.encoding import load_encoder

        self.encoder = load_encoder(resolve_model(model), "cuda" if torch.cuda.is_available() else "cpu")
        self.whole = self.encoder.positions >= WHOLE_TEXT

    def score(self, pictures: Sequence[Picture], rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The three columns of similarity for each row."""
        from modeling_lrsclip.encoding import embed_images, embed_texts

        model, processor = self.encoder.model, self.encoder.processor
        images = embed_images(model, processor, [picture.image for picture in pictures])  # (B, D)
        columns: list[dict[str, Any]] = []
        for image, row in zip(images, rows):
            sentences = split_sentences(row["long_text"])
            texts = embed_texts(model, processor, [row["long_text"], row["short_text"], *sentences])  # (2 + S, D)
            long, short, *each = (round(float(value), 4) for value in texts.double() @ image.double())
            long = long if self.whole else round(sum(each) / len(each), 4)
            columns.append({"long_similarity": long, "short_similarity": short, "sentence_similarities": each})
        return columns


@dataclass
class ClaimCheck:
    """Claims of long texts, asked back."""

    captioner: Captioner  # sees images
    prompt: Prompt  # with the place {question}
    answers: AnswerStore  # keeps them
    gate: Gate  # shared with a captioner that gathers batches
    max_tokens: int  # of an answer
    most_silent: int = 50  # rows in a row without any answer, before an error ends the run
    silent: int = 0  # rows in a row whose questions all stayed without an answer

    async def score(self, pictures: Sequence[Picture], rows: Sequence[Row]) -> list[dict[str, Any]]:
        """
        The two columns of claims for each row.

        Raises:
            `ValueError`: after `most_silent` rows in a row whose questions all stayed without an answer.
        """
        claims = [claims_of(row["long_text"]) for row in rows]
        asked = [(picture, claim) for picture, row_claims in zip(pictures, claims) for claim in row_claims]
        self.gate.rows, self.gate.full = len(asked), True
        tasks = [asyncio.ensure_future(self._ask(picture, claim)) for picture, claim in asked]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        following = iter(answers)
        by_row = [[next(following) for _ in row_claims] for row_claims in claims]
        for failed in filter(None, by_row):
            silent = all(isinstance(answer, NoAnswer) for answer in failed)
            self.silent = self.silent + 1 if silent else 0
            if self.silent >= self.most_silent:
                raise ValueError(
                    f"captioner {self.captioner.id} left {self.silent} rows in a row without an answer, the last: "
                    f"{failed[-1]}; see that it runs, then run the same command again. Answers so far are kept."
                )
        return [_claim_columns(row_claims, row_answers) for row_claims, row_answers in zip(claims, by_row)]

    async def _ask(self, picture: Picture, claim: Claim) -> str | NoAnswer:
        try:
            user, sampling = self.prompt.fill({"question": claim.question}), Sampling(0.0, 1.0, self.max_tokens, 0)
            request = Request(self.prompt.system, user, picture, sampling)
            return (await self.answers.ask(self.captioner, request)).text
        except NoAnswer as error:
            return error
        finally:
            self.gate.rows -= 1
            self.gate.settle()


def _claim_columns(claims: Sequence[Claim], answers: Sequence[str | NoAnswer]) -> dict[str, Any]:
    verdicts = [None if isinstance(answer, NoAnswer) else read_answer(answer) for answer in answers]
    known = [verdict for verdict in verdicts if verdict is not None]
    listed = [vars(claim) | {"answer": verdict} for claim, verdict in zip(claims, verdicts)]
    confirmed = sum(known) / len(known) if known else None
    return {"claims": json.dumps(listed, ensure_ascii=False), "claims_confirmed": confirmed}


class Verification:
    """
    One run over a data set.

    Args:
        folder: the finished data set.
        recipe: with the section `verify`.
        target: folder to write.

    Raises:
        `ValueError`: for what cannot be found or does not fit; nothing has been asked by then.
    """

    def __init__(self, folder: Path, recipe: Recipe, target: Path):
        if recipe.verify is None:
            raise ValueError("the recipe has no section verify; give it a model, a captioner or both.")
        self.folder, self.target, self.config, self.recipe = folder, target, recipe.verify, recipe
        self.manifest = read_manifest(folder)
        captioner = recipe.captioners.get(self.config.captioner or "")
        settings = captioner and [captioner.model, captioner.revision, captioner.max_image_side, captioner.extra]
        decides = [plain_values(self.config), settings, recipe.shard_rows, recipe.shard_bytes]
        identity = json_sha256([data_hash(self.manifest), decides])
        progress = load_progress(target, "verify") or Progress(identity, command="verify")
        if progress.recipe_hash != identity:
            raise ValueError(f"{target} was begun with other data or another section verify; take another --output.")
        self.similarity = Similarity(self.config.model) if self.config.model else None
        self.prompt = load_prompt(TextConfig(captioner="verify", prompt=PROMPT), Path())
        self.output = Output(target, self.manifest["format"], (recipe.shard_rows, recipe.shard_bytes), progress)

    async def run(self) -> dict[str, Any]:
        """Score what is left of the rows, finish the folder and return its manifest."""
        gate = Gate()
        answers = AnswerStore(self.target / WORK / "answers.sqlite", gate)
        captioner = None
        try:
            claims = None
            if self.config.captioner:
                config = self.recipe.captioners[self.config.captioner]
                captioner = build_captioner(config, gate)
                gate.captioners = [captioner] if hasattr(captioner, "waiting") else []
                rows = max(2, count_rows(self.manifest))  # one may be refused
                most_silent = min(self.recipe.max_failures_in_a_row, rows)
                claims = ClaimCheck(captioner, self.prompt, answers, gate, config.max_tokens, most_silent)
            if not self.output.progress.complete:
                await self._score_all(claims)
            return self._finish()
        finally:
            answers.close()
            self.output.close()
            if captioner is not None:
                await captioner.close()

    async def _score_all(self, claims: ClaimCheck | None) -> None:
        done = self.output.progress.index
        if not done:  # what the build left out, and its counts, stay known
            self.output.copy_lists(self.folder)
            for source, counts in self.manifest["counts"].items():
                for what, times in counts.items():
                    if what not in SPLITS:
                        self.output.count(source, what, times)
        rows = islice(read_rows(self.folder, self.manifest), done, None)
        with tqdm(total=count_rows(self.manifest), initial=done, unit=" rows", disable=None) as bar:
            while chunk := list(islice(rows, min(CHUNK, self.output.room))):
                await self._score(chunk, claims)
                done += len(chunk)
                bar.update(len(chunk))
                if self.output.full:
                    self.output.checkpoint(0, done)
        self.output.checkpoint(1, done)

    async def _score(self, chunk: list[tuple[str, Row]], claims: ClaimCheck | None) -> None:
        rows = [row for _, row in chunk]
        if missing := next((row["id"] for row in rows if not row["image"]), None):
            raise ValueError(f"row {missing} has no pixels; put them back with training.lrs2m.rejoin first.")
        pictures = [read_picture(row["image"], 1) for row in rows]
        for score in (
            self.similarity and self.similarity.score(pictures, rows),
            claims and await claims.score(pictures, rows),
        ):
            rows = [row | columns for row, columns in zip(rows, score)] if score else rows
        for (split, _), row in zip(chunk, rows):
            if unanswered(row):
                self.output.count(row["source"], "unanswered")
            if fault := below_threshold(row, self.config):
                self.output.refuse_row(row, *fault)
            else:
                self.output.add(row, split)

    def _finish(self) -> dict[str, Any]:
        shown = public_recipe(self.recipe)
        described = shown["verify"] | {
            "captioner": shown["captioners"].get(self.config.captioner),
            "prompt": {"id": self.prompt.id, "hash": self.prompt.hash},
        }
        self.output.finish(self.manifest | {"verify": described})
        return read_manifest(self.target)


def below_threshold(row: Row, config: VerifyConfig) -> tuple[str, str] | None:
    """
    The threshold that a row's scores do not reach.

    Args:
        row: with its scores.
        config: with the thresholds.

    Returns:
        Its name and the score in words, or None.
    """
    if config.min_similarity is not None:
        for which in ("long", "short"):
            if (score := row[f"{which}_similarity"]) < config.min_similarity:
                return "similarity", f"{which} text {score:.3f}, below {config.min_similarity:g}"
    if config.min_confirmed is not None:
        if unanswered(row):
            return "claims", "no answer"
        if (confirmed := row["claims_confirmed"]) is not None and confirmed < config.min_confirmed:
            return "claims", f"{confirmed:.0%} confirmed, below {config.min_confirmed:.0%}"
    return None


def unanswered(row: Row) -> bool:
    """Whether claims of a row were asked and none was answered with yes or no."""
    return row["claims_confirmed"] is None and bool(json.loads(row["claims"] or "[]"))


@command(interrupted="interrupted; run the same command again to go on.")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m training.lrs2m.verify", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a finished data set with pixels")
    add("--config", nargs="+", metavar="RECIPE", help="recipe files whose section verify says what to ask")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the recipe")
    add("--output", type=Path, help="the folder to make")
    add("--sheet", type=int, metavar="ROWS", help="write so many rows for a person to read")
    add("--read-sheet", action="store_true", help="read the filled-in sheet back")
    print(_run(parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> str:
    folder, sheet = options.folder, options.folder / "sheet" / SHEET
    if options.read_sheet or options.sheet is not None:
        if options.sheet is not None and options.sheet < 1 and not options.read_sheet:
            raise ValueError(f"--sheet {options.sheet} asks for no rows; give a number from 1.")
        manifest = read_manifest(folder)
        identity = data_hash(manifest)
    if options.read_sheet:
        rates = read_sheet(sheet, identity)
        replace_json(folder / HAND_READ, {"data_sha256": identity} | rates)
        count = rates.pop("rows")
        return "\n".join(
            f"{which}: {one['false']} of {count} with a false statement, {one['rate']:.1%} ({one['low']:.1%} to "
            f"{one['high']:.1%})"
            for which, one in rates.items()
        )
    if options.sheet is not None:
        rows, title = (row for _, row in read_rows(folder, manifest)), f"{manifest['name']}: are the captions true?"
        drawn = write_sheet(rows, options.sheet, sheet.parent, title, identity)
        return f"{drawn} rows in {sheet}; sheet.html beside it shows them. Fill it in, then --read-sheet."
    if not (options.config and options.output):
        raise ValueError("give --config RECIPE and --output DIR2 to score the rows, or --sheet ROWS, or --read-sheet.")
    recipe = read_recipe(options.config, options.set)
    if options.output.resolve() == folder.resolve():
        raise ValueError(f"--output {options.output} is the data set that is read; take another folder.")
    with only_builder(options.output, "verify"):
        manifest = asyncio.run(Verification(folder, recipe, options.output).run())
    unanswered_rows = manifest["totals"].get("unanswered", 0)
    without = f", {unanswered_rows:,} without any answer to their claims" if unanswered_rows else ""
    return f"{count_rows(manifest):,} rows with scores in {options.output}{without}"


if __name__ == "__main__":
    sys.exit(main())
