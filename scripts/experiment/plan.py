"""What the experiment of docs/experiment_smollm2.md is made of: tasks, arms, seeds; in full and small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# The tasks of both experiments that the base knows before it is trained on an arm's records.
KNOWN = ("vqa", "textcaps", "chat", "emoji_name", "own_answer", "fact")
# The tasks with short answers, of which the exact ones are counted.
SHORT = ("emoji_name", "digit", "icon", "chart", "fact")
# Stands for the q where the effective sample size is half of the records.
Q_AT_HALF = "half"
_RANDOM = ("--instance_score", "random")
# The options of `select_data_TIVE.py` that an arm stands for.
ARMS: dict[str, tuple[str, ...]] = {
    "random": ("--task_budget", "size", *_RANDOM),
    "equal": ("--task_budget", "equal", *_RANDOM),
    "tive": (),
    "tive_from_sample": ("--from_sample",),
    "difficulty_equal": ("--task_budget", "difficulty+equal", *_RANDOM),
    "difficulty_size": ("--task_budget", "difficulty+size", *_RANDOM),
    "all": ("--task_budget", "size", *_RANDOM, "--p", "1"),
    "tive_q_half": ("--q", Q_AT_HALF),
    "clusters": ("--task_budget", "difficulty+equal", "--sampling", "clusters"),
    "visual_gain": ("--task_budget", "equal", "--instance_score", "visual_gain", "--sampling", "top"),
}
MAIN = ("random", "equal", "tive", "tive_from_sample", "difficulty_equal", "difficulty_size")
# (this arm is below, that arm), which Holm's correction is over; and (this arm equals, that arm).
BELOW = (("difficulty_equal", "random"), ("difficulty_equal", "equal"), ("difficulty_equal", "tive"))
EQUAL = ("tive_from_sample", "tive")
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """One variant of the experiment.

    Attributes:
        records: of each task in the mixture, but for those that `larger` names.
        held_out: records of each task.
        captions: pictures that tower and projector are aligned on for `caption_epochs`, the language model frozen.
        tower: sizes of the CLIP tower, by the names of its config.
        rank: of LoRA.
        warm_up: share of the records that the reference model is trained on.
        per_task: records of each task whose gradients make the budgets of the arm from a sample.
        seeds: of the arms in `MAIN`; each of `others` has one.
    """

    records: int
    larger: dict[str, int]
    held_out: int
    captions: int
    caption_epochs: int
    tower: dict[str, int]
    rank: int
    warm_up: float
    per_task: int
    seeds: int
    others: tuple[str, ...]

    def records_of(self, task: str) -> int:
        """Records of a task in the mixture."""
        return self.larger.get(task, self.records)


def _tower(width: int, layers: int, heads: int, image: int = 60, patch: int = 20) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "image_size": image, "patch_size": patch}


LARGER = {"digit": 400, "chart": 300, "fact": 300}
OTHERS = ("all", "tive_q_half", "clusters", "visual_gain")
FULL = Plan(200, LARGER, 24, 1000, 3, _tower(192, 4, 3), rank=8, warm_up=0.08, per_task=40, seeds=4, others=OTHERS)
SMALL = Plan(
    8, {"digit": 16}, 2, 16, 1, _tower(48, 2, 4), rank=2, warm_up=0.25, per_task=4, seeds=1, others=OTHERS[1:2]
)


class Run(NamedTuple):
    """One training: an arm with a seed of draw and order."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.seed}"


# The model that every arm starts from.
BASE = Run("base", 0)


def runs(plan: Plan) -> list[Run]:
    """Every training, the main arms first and seed by seed."""
    return [Run(arm, seed) for seed in range(plan.seeds) for arm in MAIN] + [Run(arm, 0) for arm in plan.others]
