"""What the experiment is made of (docs/experiment.md): tasks, mixtures, arms, seeds; in full and small."""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = ("vqa", "textcaps", "chat")
NEW = ("counting", "reading", "boxes", "comparing")
LONG = ("textcaps", "chat", "boxes", "comparing")
MIXTURES = ("varied", "redundant")
P = 0.15
Q_AT_HALF = "half"


@dataclass(frozen=True)
class Arm:
    """One way to choose.

    Attributes:
        options: of `select_data_TIVE.py`; `half` stands for the q where the effective sample size is half.
        by_reference: whether it depends on a reference model; else one run serves all references.
        whole: no selection: all records, for as many "epochs" or as many "steps" as an arm.
    """

    options: tuple[str, ...] = ()
    by_reference: bool = True
    whole: str | None = None


_RANDOM = ("--instance_score", "random")
ARMS = {
    "random": Arm(("--task_budget", "size", *_RANDOM), by_reference=False),
    "equal": Arm(("--task_budget", "equal", *_RANDOM), by_reference=False),
    "tive": Arm(),
    "tive_q_half": Arm(("--q", Q_AT_HALF)),
    "equal_influence": Arm(("--task_budget", "equal", "--q", Q_AT_HALF)),
    "size_influence": Arm(("--task_budget", "size", "--q", Q_AT_HALF)),
    "loss_budget": Arm(("--task_budget", "loss")),
    "top_loss": Arm(("--task_budget", "size", "--instance_score", "loss", "--sampling", "top")),
    "top_length": Arm(("--task_budget", "size", "--instance_score", "length", "--sampling", "top")),
    "top_el2n": Arm(("--task_budget", "size", "--instance_score", "el2n", "--sampling", "top")),
    "all_epochs": Arm(by_reference=False, whole="epochs"),
    "all_steps": Arm(by_reference=False, whole="steps"),
}
# (this arm is below, that arm)
HYPOTHESES = (("tive", "random"), ("tive", "equal"), ("tive_q_half", "tive"))


@dataclass(frozen=True)
class Plan:
    """One variant of the experiment.

    Attributes:
        records: of each task in a mixture.
        held_out: records of each task.
        base: records of the known tasks together that the base is trained on, for `base_epochs`.
        noises: which of `clean` and `noisy` each mixture has.
        references: reference models a mixture.
        shares: p of the arms random, equal and tive beside `P`.
    """

    records: dict[str, int]
    held_out: int
    base: int
    base_epochs: int
    epochs: int
    warm_up: float
    warm_up_epochs: int
    noises: tuple[str, ...]
    references: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    max_new_tokens: int


_FULL_SIZES = {"vqa": 1100, "textcaps": 800, "chat": 500, "counting": 500, "reading": 400, "boxes": 500}
FULL = Plan(
    records=_FULL_SIZES | {"comparing": 400},
    held_out=150,
    base=12_000,
    base_epochs=3,
    epochs=3,
    warm_up=0.08,
    warm_up_epochs=3,
    noises=("clean", "noisy"),
    references=2,
    seeds=tuple(range(8)),
    arms=tuple(ARMS),
    shares=(0.05, 0.3, 0.6),
    max_new_tokens=24,
)
SMALL = Plan(
    records=dict.fromkeys(_FULL_SIZES, 32) | {"comparing": 32, "vqa": 64},
    held_out=2,
    base=48,
    base_epochs=1,
    epochs=1,
    warm_up=0.3,
    warm_up_epochs=1,
    noises=("clean",),
    references=1,
    seeds=(0, 1),
    arms=("random", "equal", "tive", "tive_q_half", "all_epochs"),
    shares=(),
    max_new_tokens=4,
)


@dataclass(frozen=True)
class Run:
    """One training of the experiment: an arm with a share, a seed, and a reference where the arm depends on one."""

    arm: str
    share: float
    seed: int
    reference: int | None

    @property
    def name(self) -> str:
        reference = "" if self.reference is None else f"_r{self.reference}"
        return f"{self.arm}_p{round(100 * self.share)}{reference}_s{self.seed}"


def variants(plan: Plan) -> list[str]:
    """The mixtures' names: `varied_clean`."""
    return [f"{mixture}_{noise}" for mixture in MIXTURES for noise in plan.noises]


def runs(plan: Plan) -> list[Run]:
    """Every training on one mixture."""
    wanted = [(arm, P) for arm in plan.arms]
    wanted += [(arm, share) for share in plan.shares for arm in ("random", "equal", "tive")]
    return [
        Run(name, share, seed, reference)
        for name, share in wanted
        for reference in (range(plan.references) if ARMS[name].by_reference else (None,))
        for seed in plan.seeds
    ]
