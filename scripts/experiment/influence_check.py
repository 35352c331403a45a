"""Does influence mean what it says? A small step along a record's gradient, and the change of its task's held-out loss.

Influence is a mean cosine, so the step is along the normalised gradient: all steps are of one length. Where influence
means what it says, a record with more of it lowers the held-out loss of its task more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.experiment.results import write_csv
from scripts.experiment.statistics import rank_interval
from tive.features.batches import Batches
from tive.models import Encoded, Family, ModelFiles, Reference, family_of
from tive.models.common import target_modules
from tive.selection.reading import find_summary, read_selection
from tive.util.device import device_of
from tive.util.errors import UserError, run
from tive.util.files import read_json


def unit_gradient(family: Family, reference: Reference, weights: Sequence[Tensor], record: Encoded) -> list[Tensor]:
    """The gradient of a record's loss with respect to the counted matrices, of length 1 over all of them together."""
    loss = family.record_losses(reference, [record]).losses.sum()
    gradients = torch.autograd.grad(loss, list(weights))
    length = torch.linalg.vector_norm(torch.cat([part.double().flatten() for part in gradients]))
    return [(part / length).to(part.dtype) for part in gradients]


@torch.no_grad()
def mean_loss(family: Family, reference: Reference, records: Sequence[Encoded]) -> float:
    """Mean loss of records, in batches."""

    def losses(batch: Sequence[Encoded]) -> Tensor:
        return family.record_losses(reference, batch).losses.double()

    parts = [losses for _, losses in Batches(32, 16384).compute(losses, enumerate(records))]
    return torch.cat(parts).mean().item()


def loss_changes(
    family: Family, reference: Reference, records: Sequence[Encoded], held_out: Sequence[Encoded], step: float
) -> list[float]:
    """For each record, the change of the held-out loss by a step of length `step` against its gradient, then undone."""
    weights = [matrix.weight for matrix in target_modules(reference).values()]
    for weight in weights:
        weight.requires_grad_(True)
    before = [weight.detach().clone() for weight in weights]
    start, changes = mean_loss(family, reference, held_out), []
    for record in records:
        directions = unit_gradient(family, reference, weights, record)
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight -= step * direction
        changes.append(mean_loss(family, reference, held_out) - start)
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
    for weight in weights:
        weight.requires_grad_(False)
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--selection", type=Path, required=True, metavar="DIR", help="a selection by influence: --save_path of step 4")
    add("--input_file", type=Path, required=True, metavar="JSON", help="the records that it was drawn from")
    add("--held_out", type=Path, required=True, metavar="JSON", help="records of the same tasks")
    add("--image_folder", required=True)
    add("--model_path", required=True, help="the reference model that the influence is of")
    add("--model_base", required=True)
    add("--result", type=Path, required=True, metavar="CSV", help="where the steps are written")
    add("--records", type=int, default=30, help="records of each task, 4 or more (30)")
    add("--step", type=float, default=1e-2, help="length of the step in the space of the counted matrices (0.01)")
    arguments = parser.parse_args()
    if arguments.records < 4:
        raise UserError(f"--records {arguments.records} is too few for a correlation; give 4 or more")
    selection = read_selection(find_summary(arguments.selection))
    influence = selection.column("influence")
    records, held_out = read_json(arguments.input_file), read_json(arguments.held_out)
    files = ModelFiles(arguments.model_path, arguments.model_base)
    family = family_of(files)
    family.check_files(files)
    reference = family.load(files, device_of("cpu"), torch.float32)

    def encoded(record: dict[str, Any]) -> Encoded:
        return family.encode(reference.processor, record, arguments.image_folder)

    steps: list[dict[str, object]] = []
    for index, task in enumerate(tqdm(selection.tasks, desc="Steps", unit=" tasks")):
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(influence[rows])]
        drawn = np.random.default_rng(0).permutation(rows)[: arguments.records].tolist()
        of_task = [encoded(record) for record in held_out if record["dataset"] == task.name]
        changes = loss_changes(family, reference, [encoded(records[row]) for row in drawn], of_task, arguments.step)
        steps += [
            {"task": task.name, "row": row, "influence": influence[row], "fall_of_loss": -change}
            for row, change in zip(drawn, changes, strict=True)
        ]
        middle, low, high = rank_interval([influence[row] for row in drawn], [-change for change in changes])
        print(f"{task.name}: rank correlation {middle:+.2f} ({low:+.2f} to {high:+.2f})")
    write_csv(arguments.result, steps)


if __name__ == "__main__":
    run(main)
