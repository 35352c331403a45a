"""What the second experiment is made of (docs/experiment_smollm2.md): tasks, arms, seeds; in full and small."""

from __future__ import annotations

from dataclasses import dataclass

# The tasks of both experiments that the base knows before it is trained on an arm's records.
KNOWN = ("vqa", "textcaps", "chat", "emoji_name", "own_answer", "fact")
# The second's tasks whose answers can be asked for word by word.
SHORT = ("emoji_name", "digit", "icon", "chart", "fact")
P = 0.15
Q_AT_HALF = "half"
_RANDOM = ("--instance_score", "random")
# The options of `select_data_TIVE.py` that an arm stands for; `half` is the q where the effective sample size is half.
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
class Sizes:
    """Records of tasks in the mixture, of each task held out, and pictures that the base is aligned on.

    A task that `larger` does not name has `records`.
    """

    records: int
    larger: dict[str, int]
    held_out: int
    captions: int

    def of(self, task: str) -> int:
        """Records of a task in the mixture."""
        return self.larger.get(task, self.records)


@dataclass(frozen=True)
class Tower:
    """The shape of a CLIP tower: width, layers, heads, and the sides of image and patch in pixels."""

    width: int
    layers: int
    heads: int
    image: int
    patch: int


@dataclass(frozen=True)
class Plan:
    """One variant of the experiment.

    Attributes:
        caption_epochs: of tower and projector on captions, the language model frozen.
        warm_up: share of the records that the reference model is trained on.
        per_task: records of each task whose gradients make the budgets of the arm from a sample.
        seeds: of the arms in `MAIN`; `others` of the rest, in this order.
    """

    sizes: Sizes
    tower: Tower
    caption_epochs: int
    epochs: int
    rank: int
    warm_up: float
    per_task: int
    seeds: int
    others: dict[str, int]


FULL = Plan(
    sizes=Sizes(records=200, larger={"digit": 400, "chart": 300, "fact": 300}, held_out=24, captions=1000),
    tower=Tower(width=192, layers=4, heads=3, image=60, patch=20),
    caption_epochs=3,
    epochs=1,
    rank=8,
    warm_up=0.08,
    per_task=40,
    seeds=4,
    others={"all": 1, "tive_q_half": 1, "clusters": 1, "visual_gain": 1},
)
SMALL = Plan(
    sizes=Sizes(records=8, larger={"digit": 16}, held_out=2, captions=16),
    tower=Tower(width=48, layers=2, heads=4, image=60, patch=20),
    caption_epochs=1,
    epochs=1,
    rank=2,
    warm_up=0.25,
    per_task=4,
    seeds=1,
    others={"tive_q_half": 1},
)


@dataclass(frozen=True)
class Run:
    """One training: an arm with a seed of draw and order; `base` is the model that every arm starts from."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.seed}"


def runs(plan: Plan) -> list[Run]:
    """Every training, the main arms first and seed by seed."""
    main = [Run(arm, seed) for seed in range(plan.seeds) for arm in MAIN]
    return main + [Run(arm, seed) for arm, count in plan.others.items() for seed in range(count)]
