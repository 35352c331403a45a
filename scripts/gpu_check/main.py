"""Does everything hold on this GPU? Each check prints pass or fail with its figures; `bash scripts/gpu_check.sh`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch, as the step does


import torch

from scripts.gpu_check import checks, speed
from scripts.gpu_check.goldens import GOLDENS, NotHere
from tive.util.device import device_name, device_of
from tive.util.errors import run
from tive.util.files import write_json

# A check gives its figures, and what is wrong, empty where nothing is.
Check = Callable[[torch.device], tuple[dict[str, float], str]]


@dataclass(frozen=True)
class Result:
    """One check: `passed`, `failed` or `left out`, its figures, and why."""

    name: str
    outcome: str
    seconds: float
    figures: dict[str, float]
    why: str

    def __str__(self) -> str:
        figures = ", ".join(f"{key} {value:.3g}" for key, value in self.figures.items())
        details = "; ".join(filter(None, (figures, self.why)))
        return f"{self.outcome:<8}  {self.seconds:6.1f} s  {self.name}: {details}"


def checks_of(with_llava_7b: bool) -> Iterator[tuple[str, Check]]:
    """Every check by its name, the short ones first."""
    yield "sparse projector: its formula, the same bits twice", checks.sparse_is_its_formula
    yield "TRAK's CudaProjector: bound and small gradients", checks.trak_keeps_small_gradients
    for name in GOLDENS:
        for dtype in checks.TOLERANCES:
            title = f"golden {name} in {str(dtype).removeprefix('torch.')}"
            yield title, partial(checks.golden_holds, name, dtype)
    yield "a batch against its records alone, with and without checkpointing", checks.a_batch_is_its_records_alone
    yield "a base in 4 bits", checks.four_bits_are_a_batch_alone
    yield "a real lack of memory", checks.out_of_memory_is_survived
    yield "forked workers, killed and continued", checks.killed_runs_are_continued
    yield "speed: text model of LLaVA-7B's width", partial(speed.speed, speed.TEXT)
    yield "speed: Qwen2.5-VL-3B's shape", partial(speed.speed, speed.QWEN_3B)
    if with_llava_7b:
        yield "speed: LLaVA-1.5-7B's shape", partial(speed.speed, speed.LLAVA_7B)


def run_check(name: str, check: Check, device: torch.device) -> Result:
    """Run one check; whatever it raises is a failure of its own."""
    begin, figures = time.perf_counter(), dict[str, float]()
    try:
        figures, why = check(device)
        outcome = "failed" if why else "passed"
    except (NotHere, ImportError) as reason:
        outcome, why = "left out", str(reason)
    except Exception as error:  # the others are to run all the same
        outcome, why = "failed", f"{type(error).__name__}: {error}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Result(name, outcome, time.perf_counter() - begin, figures, " ".join(why.split())[:300])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--llava_7b", action="store_true", help="also measure LLaVA-1.5-7B's shape with random weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K; on a CPU shapes are small: it shows that they run")
    add("--seconds", type=float, default=300, help="no check is begun after so long (300)")
    add("--output", type=Path, default=Path("gpu_check.json"), help="the JSON with everything (gpu_check.json)")
    arguments, begin = parser.parse_args(), time.perf_counter()
    device = device_of(arguments.device)
    about = {"device": device_name(device), "torch": torch.__version__, "python": sys.version.split()[0]}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results: list[Result] = []
    for name, check in checks_of(arguments.llava_7b):
        if time.perf_counter() - begin > arguments.seconds:
            results.append(Result(name, "left out", 0.0, {}, f"{arguments.seconds:g} s were over"))
        else:
            results.append(run_check(name, check, device))
        print(results[-1], flush=True)
        write_json(arguments.output, about | {"checks": [asdict(each) for each in results]})
    outcomes = [result.outcome for result in results]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "left out"))
    print(f"{counts}; written: {arguments.output}")
    sys.exit(1 if "failed" in outcomes else 0 if "passed" in outcomes else 2)


if __name__ == "__main__":
    run(main)
