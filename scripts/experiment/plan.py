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
        target: chosen for the target records by `select_data_LESS.py`.
    """

    options: tuple[str, ...] = ()
    by_reference: bool = True
    whole: str | None = None
    target: bool = False


_RANDOM = ("--instance_score", "random")
ARMS = {
    "random": Arm(("--task_budget", "size", *_RANDOM), by_reference=False),
    "equal": Arm(("--task_budget", "equal", *_RANDOM), by_reference=False),
    "tive": Arm(),
    "tive_q_half": Arm(("--q", Q_AT_HALF)),
    "equal_influence": Arm(("--task_budget", "equal", "--q", Q_AT_HALF)),
    "size_influence": Arm(("--task_budget", "size", "--q", Q_AT_HALF)),
    "loss_budget": Arm(("--task_budget", "loss")),
    "less": Arm(target=True),
    "top_loss": Arm(("--task_budget", "size", "--instance_score", "loss", "--sampling", "top")),
    "top_length": Arm(("--task_budget", "size", "--instance_score", "length", "--sampling", "top")),
    "top_el2n": Arm(("--task_budget", "size", "--instance_score", "el2n", "--sampling", "top")),
    "all_epochs": Arm(by_reference=False, whole="epochs"),
    "all_steps": Arm(by_reference=False, whole="steps"),
}
# (this arm is below, that arm)
HYPOTHESES = (("tive", "random"), ("tive", "equal"), ("tive_q_half", "tive"))
# The arms that are compared at other shares of the records too.
AT_ALL_SHARES = ("random", "equal", "tive")
# Checkpoints of a reference model, by epoch, whose gradients LESS takes.
LESS_EPOCHS = (1, 3)


@dataclass(frozen=True)
class Plan:
    """One variant of the experiment.

    Attributes:
        records: of each task in a mixture.
        held_out: records of each task; `target`: of each task, for LESS.
        base: records of the known tasks that the base is trained on, for `base_epochs`.
        clean: how many seeds each arm has on a mixture without wrong answers, with each of `references`.
        noisy: the same with wrong answers, with the first reference alone; empty: no such mixtures.
        shares: p of the arms random, equal and tive beside `P`, with `share_seeds` seeds and the first reference.
        halves: random halves of the records for the linear datamodelling score, each trained on twice.
        steps: records of each task along whose gradient one step is made.
    """

    records: dict[str, int]
    held_out: int
    target: int
    base: dict[str, int]
    base_epochs: int
    epochs: int
    warm_up: float
    references: int
    clean: dict[str, int]
    noisy: dict[str, int]
    shares: tuple[float, ...]
    share_seeds: int
    halves: int
    steps: int
    max_new_tokens: int


_TASKS = (*KNOWN, *NEW)
_MAIN = dict.fromkeys(("random", "equal", "tive", "tive_q_half"), 8)
FULL = Plan(
    records=dict.fromkeys(_TASKS, 400) | {"vqa": 700, "textcaps": 500},
    held_out=100,
    target=10,
    base={"vqa": 6000, "textcaps": 4000, "chat": 1500},
    base_epochs=3,
    epochs=3,
    warm_up=0.08,
    references=2,
    clean=_MAIN
    | {"equal_influence": 4, "size_influence": 2, "loss_budget": 2, "less": 4}
    | {"top_loss": 1, "top_length": 1, "top_el2n": 1, "all_epochs": 2, "all_steps": 2},
    noisy=dict.fromkeys(_MAIN, 4) | {"equal_influence": 4, "all_epochs": 1},
    shares=(0.05, 0.3, 0.6),
    share_seeds=2,
    halves=16,
    steps=30,
    max_new_tokens=24,
)
SMALL = Plan(
    records=dict.fromkeys(_TASKS, 32) | {"vqa": 64},
    held_out=2,
    target=1,
    base=dict.fromkeys(KNOWN, 16),
    base_epochs=1,
    epochs=1,
    warm_up=0.3,
    references=1,
    clean=dict.fromkeys(_MAIN, 2) | {"less": 1, "all_epochs": 1},
    noisy={},
    shares=(),
    share_seeds=0,
    halves=4,
    steps=5,
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
    return [f"{mixture}_{noise}" for noise in ("clean", "noisy") for mixture in MIXTURES if seeds(plan, noise)]


def seeds(plan: Plan, variant: str) -> dict[str, int]:
    """How many seeds each arm has on a mixture."""
    return plan.noisy if variant.endswith("noisy") else plan.clean


def references(plan: Plan, variant: str) -> range:
    """The references of a mixture."""
    return range(1 if variant.endswith("noisy") else plan.references)


def runs(plan: Plan, variant: str) -> list[Run]:
    """Every training on one mixture, those of the main arms first."""
    wanted = [
        Run(arm, P, seed, reference)
        for arm, count in seeds(plan, variant).items()
        for seed in range(count)
        for reference in (references(plan, variant) if ARMS[arm].by_reference else (None,))
    ]
    if variant.endswith("clean"):
        wanted += [
            Run(arm, share, seed, 0 if ARMS[arm].by_reference else None)
            for share in plan.shares
            for arm in AT_ALL_SHARES
            for seed in range(plan.share_seeds)
        ]
    return wanted
