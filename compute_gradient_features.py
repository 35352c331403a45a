"""Step 3: the projected LoRA gradient of every record on the reference model, and its norm (paper section 3.2)."""

from __future__ import annotations

import argparse
import os
from functools import cache, partial
from pathlib import Path

from tive.util.errors import UserError
from tive.util.errors import run as run_script

EXAMPLES = """
one GPU:
  python compute_gradient_features.py --input_file data.json --image_folder images \\
      --model_path checkpoints/reference-lora --model_base vicuna-7b-v1.5 --output_file features
all GPUs of this machine, one process each, which takes one open chunk after the other:
  bash scripts/compute_gradients.sh --input_file data.json ...
or with torchrun, which tells each process its chunk; or a SLURM array:
  torchrun --nproc_per_node 8 compute_gradient_features.py --input_file data.json ...
  sbatch scripts/compute_gradients.sbatch --input_file data.json ...
for LESS, the gradient as the checkpoint's Adam would apply it (docs/less.md):
  python compute_gradient_features.py --model_path checkpoints/reference-lora/checkpoint-105 --gradient adam ...

A run that stops, however it stops, is continued by the same command.
"""


def chunk_index(text: str) -> int | str:
    """`any`, or the number of a chunk."""
    return text if text == "any" else int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input_file", required=True, help="records: a JSON list or JSON Lines")
    add("--model_path", required=True, help="reference model: the folder that finetune_lora.sh wrote")
    add("--model_base", required=True, help="the base that it was trained from: a folder, or a downloaded name")
    add("--output_file", required=True, metavar="DIR", help="folder for the features, one set of files a chunk")
    add("--image_folder", default="", help="folder that the records' image paths start from")
    add("--num_chunks", type=int, help="cut the records into N chunks (default 1, or the number of processes)")
    add(
        "--chunk_idx",
        type=chunk_index,
        metavar="K|any",
        help="compute chunk K of 0 .. N-1, or any open one after the other (default: from torchrun or SLURM, else 0)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="default: by the device")
    add("--batch_size", type=int, default=16, help="most records in a batch (16)")
    add("--max_batch_tokens", type=int, default=16384, help="most tokens in a batch, with padding (16384)")
    add("--window", type=int, default=512, help="records computed and written as one; what a crash can cost (512)")
    add("--gradient_checkpointing", action="store_true", help="less memory for a third more time, same gradients")
    add("--grad_modules", default="self_attn", help="which LoRA matrices count: self_attn, mlp, q_proj,v_proj, all")
    add("--last_layers", type=int, metavar="N", help="count the last N layers alone: cheaper, less faithful")
    kinds = ("auto", "sparse", "trak_cuda", "trak_basic")
    add(
        "--projector", default="auto", type=projector_kind, choices=kinds, help="auto: trak_cuda if it works, or sparse"
    )
    add("--proj_dim", type=int, default=8192, help="numbers in a feature (8192)")
    add("--gradient", default="sgd", choices=("sgd", "adam"), help="as it is, or for LESS as Adam applies it (sgd)")
    add("--adam_form", choices=("adam", "release"), help="Adam's own step, or that of LESS's code (adam)")
    add("--optimizer_state", metavar="PATH", help="Adam's state, where it is not beside --model_path")
    add("--el2n", action="store_true", help="also compute EL2N, which needs the softmax over the vocabulary")
    add("--seed", type=int, default=0, help="of the projection; the same for every chunk (0)")
    add("--num_workers", type=int, help="processes that read and encode (4 beside a GPU, 1 beside a CPU)")
    add("--vision_tower", help="folder of the vision tower, where the path in the checkpoint is not there")
    add("--chat_template", metavar="FILE", help="instead of the model's own (transformers' models; docs/native.md)")
    add("--max_length", type=int, help="leave longer records out (transformers' models; none)")
    add("--max_pixels", type=int, help="make larger images smaller first (transformers' models; none)")
    add("--on_bad_record", default="stop", choices=("stop", "skip"), help="bad records and images: stop, or leave out")
    add(
        "--most_left_out",
        type=float,
        metavar="SHARE",
        help="with --on_bad_record skip: the share of the records that may be left out because nothing in them is "
        "supervised or their gradient is not finite, 0 to 1; above it the run stops (default: 0.02 or two records)",
    )
    add(
        "--check_images", default="exist", choices=("exist", "full"), help="before the run: are they there, or open all"
    )
    add("--dry_run", type=int, metavar="N", help="compute N records, say what the whole run costs, write no features")
    add("--overwrite", action="store_true", help="start afresh where another run's files are")
    arguments = parser.parse_args()
    for name in ("batch_size", "max_batch_tokens", "window", "proj_dim", "dry_run", "max_length", "max_pixels"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is not a positive number")
    for name in ("adam_form", "optimizer_state"):
        if arguments.gradient != "adam" and getattr(arguments, name):
            parser.error(f"--{name} has no meaning without --gradient adam")
    if arguments.overwrite and arguments.chunk_idx == "any":
        parser.error("--overwrite would start the chunks of other processes afresh; empty the folder, or leave it out")
    if arguments.most_left_out is not None:
        if not 0 <= arguments.most_left_out <= 1:
            parser.error(f"--most_left_out {arguments.most_left_out} is not a share, 0 to 1")
        if arguments.on_bad_record != "skip":
            parser.error("--most_left_out says how many records may be left out; add --on_bad_record skip")
    return arguments


def projector_kind(name: str) -> str:
    if name == "rademacher":
        raise argparse.ArgumentTypeError(
            "rademacher is no more: sparse gives features of the same quality for less time"
        )
    return name


def main() -> None:
    arguments = parse_arguments()
    # Threads that spin long take the cores from the processes that read, threads that never spin wake too late
    # (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Imported after the arguments are read, so that --help does not wait for torch.
    from tive.data.images import open_image
    from tive.data.records import chunk_range
    from tive.features.lock import compute_open_chunks
    from tive.features.manifest import Run
    from tive.gradient_pass.batches import GradientStep
    from tive.gradient_pass.chunk import PassOptions, compute_chunk, estimate_chunk
    from tive.gradient_pass.launch import place_of
    from tive.gradient_pass.optimizer import gradient_kind, transform_of
    from tive.gradient_pass.preflight import Tolerance, read_data
    from tive.method.projection import make_projector
    from tive.models import ModelFiles, family_of
    from tive.models.common import base_folder, target_modules
    from tive.util.device import device_of, dtype_of, leave_a_core

    place = place_of(arguments.num_chunks, arguments.chunk_idx, os.environ)
    device = device_of(arguments.device, place.local_rank)
    dtype = dtype_of(arguments.dtype, device)
    files = ModelFiles(
        arguments.model_path,
        base_folder(arguments.model_base),
        arguments.vision_tower,
        arguments.chat_template,
        arguments.max_length,
        arguments.max_pixels,
    )
    family = family_of(files)
    family.check_files(files)
    form = (arguments.adam_form or "adam") if arguments.gradient == "adam" else None
    gradient = gradient_kind(arguments.model_path, form, arguments.optimizer_state)
    data = read_data(arguments.input_file, family.record_problem)
    model = family.identity(files)
    options = PassOptions(
        folder=Path(arguments.output_file),
        image_folder=arguments.image_folder,
        read_image=partial(open_image, padded=family.pads_images(files)) if arguments.check_images == "full" else None,
        tolerance=Tolerance(arguments.on_bad_record == "skip", arguments.most_left_out),
        overwrite=arguments.overwrite,
        projector=arguments.projector,
        num_workers=arguments.num_workers,
        inputs={
            "data_path": os.path.abspath(arguments.input_file),
            "model_path": arguments.model_path,
            "model_base": arguments.model_base,
            "image_folder": os.path.abspath(arguments.image_folder),
            "learning_rates": gradient.learning_rates,
        },
    )

    @cache  # once for all chunks
    def load() -> GradientStep:
        reference = family.load(files, device, dtype, arguments.gradient_checkpointing)
        matrices = target_modules(reference, arguments.grad_modules, arguments.last_layers)
        if device.type == "cpu":
            leave_a_core(max(matrix.in_features for matrix in matrices.values()))
        parameters = sum(matrix.weight.numel() for matrix in matrices.values())
        layers = len({name.split(".")[1] for name in matrices})
        print(
            f"reference model {files.model_path}: {parameters:,} parameters count, in {len(matrices)} LoRA matrices of "
            f"{layers} of {len(reference.layers)} layers"
        )
        try:
            projector = make_projector(arguments.projector, arguments.seed, arguments.proj_dim, device)
        except ValueError as error:
            remedy = (
                "use --projector auto" if arguments.projector.startswith("trak") else "report it with your versions"
            )
            raise UserError(f"--projector {error}; {remedy}") from error
        print(f"projector {projector.kind}: {projector.about}")
        transform = transform_of(gradient, reference, matrices, arguments.model_path)
        return GradientStep(family, reference, matrices, projector, transform, arguments.el2n)

    def compute(chunk_idx: int) -> None:
        rows = chunk_range(len(data.records), place.num_chunks, chunk_idx)
        name = f"chunk {chunk_idx} of {place.num_chunks} ({place.source})"
        print(f"{name}: {len(rows)} of {len(data.records)} records, from record {rows.start} on")
        run = Run(
            data_sha256=data.records.sha256,
            data_records=len(data.records),
            num_chunks=place.num_chunks,
            chunk_idx=chunk_idx,
            start=rows.start,
            stop=rows.stop,
            model=model,
            gradient=gradient.name,
            optimizer_state=gradient.state_sha256,
            checkpoint=gradient.step,
            grad_modules=arguments.grad_modules,
            last_layers=arguments.last_layers,
            proj_seed=arguments.seed,
            proj_dim=arguments.proj_dim,
            dtype=str(dtype).removeprefix("torch."),
            batch_size=arguments.batch_size,
            max_batch_tokens=arguments.max_batch_tokens,
            gradient_checkpointing=arguments.gradient_checkpointing,
            window=arguments.window,
            el2n=arguments.el2n,
        )
        if arguments.dry_run:
            estimate_chunk(arguments.dry_run, data, run, options, load)
        else:
            compute_chunk(name, data, run, options, load)

    if place.chunk_idx is not None or arguments.dry_run:
        compute(place.chunk_idx or 0)
    else:
        compute_open_chunks(place.num_chunks, compute)


if __name__ == "__main__":
    run_script(main)
