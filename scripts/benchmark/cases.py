"""What the gradient benchmarks measure on: a reference model and batches of encoded records."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.features.batches import Batches
from tive.models import Encoded, LeftOut, ModelFiles, Reference, family_of
from tive.models.checkpoint import base_folder
from tive.models.common import target_modules
from tive.util.device import device_of, dtype_of
from tive.util.errors import UserError

from . import models


@dataclass(frozen=True, eq=False)
class Case:
    """A reference model, records, and the batches (indices of records) that every method runs on.

    Attributes:
        family: what computes the losses: a model family, or a module with its `record_losses`.
        tasks: of each record.
    """

    family: Any
    reference: Reference
    matrices: Mapping[str, nn.Linear]
    records: list[Encoded]
    tasks: list[str]
    batches: list[list[int]]

    @property
    def parameters(self) -> int:
        return sum(matrix.weight.numel() for matrix in self.matrices.values())

    def losses(self, batch: list[int]) -> Tensor:
        """The forward pass: losses `[B]` of a batch."""
        losses: Tensor = self.family.record_losses(self.reference, [self.records[number] for number in batch]).losses
        return losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input_file", help="records")
    add("--image_folder", default="", help="folder of their images")
    add("--model_path", help="reference model, of any family")
    add("--model_base", help="its base")
    add("--vision_tower", help="its vision tower, where the path in the checkpoint is not there")
    add("--llava_7b", action="store_true", help="instead: LLaVA-1.5-7B's shape with random weights, made on the device")
    add("--text", type=int, nargs=3, metavar=("WIDTH", "LAYERS", "TOKENS"), help="instead: a random text-only Llama")
    add("--records", type=int, default=128, help="how many records")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="by the device")
    add("--threads", type=int, help="threads of torch; as torch chooses if not given")
    add("--batch_size", type=int, default=16, help="most records in a batch")
    add("--max_batch_tokens", type=int, default=16384, help="most tokens in a batch, with padding")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")


def make_case(arguments: argparse.Namespace) -> Case:
    """The case that the arguments name, its batches in random order: a part of them stands for all.

    Raises:
        UserError: no model is named, or a record cannot be used.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, checkpointing = device_of(arguments.device), arguments.gradient_checkpointing
    dtype = dtype_of(arguments.dtype, device)
    if arguments.llava_7b or arguments.text:
        shape = models.LLAVA_7B if arguments.llava_7b else models.text_shape(*arguments.text)
        family, reference = models.random_model(shape, device, dtype, checkpointing)
        records = models.random_records(shape, arguments.records, reference)
        tasks = [str(number % 8) for number in range(arguments.records)]
    elif arguments.input_file and arguments.model_path and arguments.model_base:
        files = ModelFiles(arguments.model_path, base_folder(arguments.model_base), arguments.vision_tower)
        family = family_of(files)
        family.check_files(files)
        reference = family.load(files, device, dtype, checkpointing)
        records, tasks = encoded_records(arguments, family, reference)
    else:
        raise UserError("give --input_file, --model_path and --model_base, or --llava_7b or --text")
    cut = Batches(arguments.batch_size, arguments.max_batch_tokens).cut(list(enumerate(records)))
    batches = [[number for number, _ in batch] for batch in cut]
    batches = [batches[number] for number in np.random.default_rng(0).permutation(len(batches))]
    return Case(family, reference, target_modules(reference), records, tasks, batches)


def encoded_records(
    arguments: argparse.Namespace, family: Any, reference: Reference
) -> tuple[list[Encoded], list[str]]:
    """Records spread evenly over the data file, encoded, and the task of each."""
    from tive.data.records import open_records

    file = open_records(arguments.input_file)
    rows = np.linspace(0, len(file) - 1, min(arguments.records, len(file))).astype(int).tolist()
    records = []
    begin = time.perf_counter()
    for row in rows:
        if problem := family.record_problem(file[row]):
            raise UserError(f"{file.path}: record {row} {problem}; repair or remove it")
        try:
            records.append(family.encode(reference.processor, file[row], arguments.image_folder))
        except LeftOut as reason:
            raise UserError(f"record {row}: {reason}; the benchmark wants records that can all be used") from reason
    cost = (time.perf_counter() - begin) / len(rows) * 1000
    print(
        f"encoding, which the step's loader does beside the device: {cost:.1f} ms a record, in none of the times below"
    )
    return records, [str(file[row].get("dataset")) for row in rows]
