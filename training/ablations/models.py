"""Models and data of an ablation's arms: small CLIPs made here, or a user's own recipe and data."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import Run, Source, arm_fields, field_of, read_recipe, with_fields
from .studies import LONG_CLIP, LONG_CLIP_RANK, Arm, Ladders


CONFIGS = Path(__file__).parents[1] / "configs"
RECIPE, PRETRAINING = CONFIGS / "ablation.yaml", CONFIGS / "ablation_pretrain.yaml"
PAPER_RECIPE = CONFIGS / "vit_b16_paper.yaml"  # for a user's data
MIDDLE = "ViT-B/16"  # the size of every study but model_size
OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
}
PUBLISHED_LONG_CLIP = "long-clip-vit-b-16"  # of the middle size
# The small CLIPs that stand for the three sizes: patches twice as large; those of ablation_pretrain.yaml; finer
# patches, wider towers, a deeper image tower.
SMALL: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"model.vision.patch_size": 32},
    "ViT-B/16": {},
    "ViT-L/14": {
        "model.text.hidden_size": 192,
        "model.text.intermediate_size": 384,
        "model.vision.patch_size": 12,
        "model.vision.hidden_size": 192,
        "model.vision.intermediate_size": 384,
        "model.vision.num_hidden_layers": 5,
        "model.projection_dim": 192,
    },
}


def arm_recipe(path: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe with `settings`, without what is not an arm's: where it is written and pushed, and when it stops early."""
    values = with_fields(read_recipe(path), settings)
    for name in ("output_dir", "resume", "push_to_hub", "push"):
        values.pop(name, None)
    if isinstance(values.get("loop"), dict):
        values["loop"].pop("patience", None)
    return values


class Models:
    """
    Runs of the arms of all studies: a recipe on some data, from some model.

    Args:
        values: the recipe's.
    """

    pcm_rank = Ladders.pcm_rank  # principal components of PCM

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def ladders(self, weights: Sequence[int]) -> Ladders:
        """Values that the studies' arms take; `weights` are tenths of the long texts' loss."""
        top = field_of(self.values, "loop.batch_size", 512)  # and its half, quarter and eighth
        sizes = tuple(sorted({max(2, top // part) for part in (8, 4, 2, 1)}))
        return Ladders(sizes, long_weights=tuple(weights), pcm_rank=self.pcm_rank)

    def run(self, arm: Arm, study: str, seed: int) -> Run:
        """
        Make the run of an arm, named after its study and arm, or after the plain recipe, which is an arm of most studies.

        Args:
            arm: what is changed.
            study: its name.
            seed: of the training.

        Returns:
            The run, not yet started.

        Raises:
            `ValueError`: for an arm from Long-CLIP where none is known.
        """
        run = self.arm_run(arm, arm_fields(arm, self.values) | {"seed": seed})
        plain = self.arm_run(Arm("LRSCLIP"), {"seed": seed})
        return plain if run.key == plain.key else dataclasses.replace(run, label=f"{study} {run.label}")


class SmallModels(Models):
    """
    Runs on the drawn scenes: CLIPs of 77 positions, pre-trained once a seed and size on other ("general") scenes, then
    fine-tuned as the arms say. The Long-CLIP of the study `init` is the same CLIP, stretched, and trained for one more
    epoch on the general scenes' long captions with their first sentences and PCM, as Long-CLIP was made from CLIP.

    Args:
        recipe: of the arms; None: that of drawn scenes.
        settings: fields of `--set`, for the arms, not for what they start from.
        scenes, general: the data of the arms, and that of what they start from.
    """

    def __init__(self, recipe: str | None, settings: dict[str, Any], scenes: Source, general: Source):
        super().__init__(arm_recipe(recipe or RECIPE, settings))
        self.plain = arm_recipe(recipe or RECIPE, {})
        self.pretraining = read_recipe(PRETRAINING)
        self.scenes, self.general = scenes, general
        self.pcm_rank = max(1, round(LONG_CLIP_RANK * field_of(self.pretraining, "model.projection_dim", 512)))

    def arm_run(self, arm: Arm, fields: dict[str, Any]) -> Run:
        """Make the run of an arm from its `fields`, the seed among them."""
        seed = fields["seed"]
        start = self._long_clip(seed) if arm.start == LONG_CLIP else self._clip(arm.size or MIDDLE, seed)
        return Run(f"{arm.name} seed {seed}", with_fields(self.values, fields), self.scenes, start)

    def _clip(self, size: str, seed: int) -> Run:
        values = with_fields(self.pretraining, SMALL[size] | {"seed": seed})
        return Run(f"CLIP {size} seed {seed}", values, self.general)

    def _long_clip(self, seed: int) -> Run:
        loss = {"loss.short_text": "first_sentence", "loss.pcm_rank": self.pcm_rank, "seed": seed}
        return Run(f"Long-CLIP seed {seed}", with_fields(self.plain, loss), self.general, self._clip(MIDDLE, seed))

    def remark(self, study: str) -> str:
        """Say what stands for the paper's models in a study."""
        return {
            "init": "Long-CLIP: the same CLIP, stretched and trained for one more epoch on the general scenes' long captions "
            f"with their first sentences and PCM ({self.pcm_rank} components), as Long-CLIP was made from CLIP.",
            "model_size": "The sizes are stand-ins: patches of 32 and 16 pixels in scenes of 96, and of 12 with wider towers "
            "and a deeper image tower, each with a pre-training of its own.",
        }.get(study, "")


class OwnModels(Models):
    """
    Runs of a user's recipe on the user's data; they start from the recipe's `model.init`.

    Args:
        long_clip: Hub id, folder or file of a Long-CLIP, for the study `init`; by default the published one where the
            recipe starts from OpenAI's ViT-B/16.
        sizes: Hub ids or folders of three CLIPs by rising size, for the study `model_size`.
    """

    def __init__(
        self,
        recipe: str | Path,
        settings: dict[str, Any],
        source: Source,
        long_clip: str | None = None,
        sizes: Sequence[str] | None = None,
    ):
        super().__init__(arm_recipe(recipe, settings))
        self.source = source
        middle = field_of(self.values, "model.init", OPENAI[MIDDLE]) == OPENAI[MIDDLE]
        self.long_clip = long_clip or (PUBLISHED_LONG_CLIP if middle else None)
        self.sizes = dict(zip(OPENAI, sizes, strict=True)) if sizes else OPENAI

    def arm_run(self, arm: Arm, fields: dict[str, Any]) -> Run:
        """Make the run of an arm from its `fields`, the seed among them."""
        fields = fields | ({"model.init": self.sizes[arm.size]} if arm.size else {})
        if arm.start == LONG_CLIP:
            if not self.long_clip:
                raise ValueError(
                    f"the study init compares with a Long-CLIP of the size of {field_of(self.values, 'model.init')}; "
                    "name one with --long-clip."
                )
            fields["model.init"] = self.long_clip
        return Run(f"{arm.name} seed {fields['seed']}", with_fields(self.values, fields), self.source)

    def remark(self, study: str) -> str:
        """Say which models a study compares."""
        return {
            "init": f"Long-CLIP: {self.long_clip}.",
            "model_size": f"The sizes: {', '.join(f'{size} {name}' for size, name in self.sizes.items())}.",
        }.get(study, "")
