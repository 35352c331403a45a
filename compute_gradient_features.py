"""Step 3: the projected LoRA gradient of every record on the reference model, and its norm (paper section 3.2)."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tive.util.errors import run

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
    add("--input_file", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder")
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
    add("--max_batch_tokens", type=int, help="most tokens in a batch, with padding (what fits; on a CPU 16384)")
    add("--window", type=int, default=512, help="records computed and written as one; what a crash can cost (512)")
    add("--gradient_checkpointing", action="store_true", help="less memory for a third more time (where it must be)")
    add("--grad_modules", default="self_attn", help="which LoRA matrices count: self_attn, mlp, q_proj,v_proj, all")
    add(
        "--projector",
        default="auto",
        choices=("auto", "sparse", "trak"),
        help="auto: on a GPU trak, the paper's, if it works there, else sparse",
    )
    add("--proj_dim", type=int, default=8192, help="numbers in a feature (8192)")
    add(
        "--gradient",
        default="sgd",
        choices=("sgd", "adam", "none"),
        help="as it is, or for LESS as Adam applies it; none: losses, EL2N and lengths alone, without features (sgd)",
    )
    add("--adam_form", choices=("adam", "release"), help="Adam's own step, or that of LESS's code (adam)")
    add("--optimizer_state", metavar="PATH", help="Adam's state, where it is not beside --model_path")
    add("--el2n", action="store_true", help="also compute EL2N, which needs the softmax over the vocabulary")
    add("--visual_gain", action="store_true", help="also compute what a record's images take off its loss")
    add("--seed", type=int, default=0, help="of the projection; the same for every chunk (0)")
    add("--num_workers", type=int, help="processes that read and encode (4 beside a GPU, 1 beside a CPU)")
    add("--vision_tower", help="folder of the vision tower, where the path in the checkpoint is not there")
    add("--chat_template", metavar="FILE", help="instead of the model's own (transformers' models; docs/native.md)")
    add("--max_length", type=int, help="leave longer records out (transformers' models; none)")
    add("--load_in_4bit", action="store_true", help="the base in 4 bits (NF4), as QLoRA trains on it; docs/native.md")
    add("--max_pixels", type=int, help="make larger images smaller first (transformers' models; none)")
    add("--on_bad_record", default="stop", choices=("stop", "skip"), help="bad records and images: stop, or leave out")
    add(
        "--check_images", default="exist", choices=("exist", "full"), help="before the run: are they there, or open all"
    )
    add("--dry_run", type=int, metavar="N", help="compute N records, say what the whole run costs, write no features")
    add("--overwrite", action="store_true", help="start afresh where another run's files are")
    arguments = parser.parse_args()
    counts = "num_chunks batch_size max_batch_tokens window proj_dim dry_run max_length max_pixels"
    for name in counts.split():
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is not a positive number")
    for name in ("adam_form", "optimizer_state"):
        if arguments.gradient != "adam" and getattr(arguments, name):
            parser.error(f"--{name} has no meaning without --gradient adam")
    if arguments.gradient == "none":
        for name in ("grad_modules", "projector", "proj_dim", "seed"):
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--{name} has no meaning with --gradient none, which computes no features")
    if arguments.overwrite and arguments.chunk_idx == "any":
        parser.error("--overwrite would start the chunks of other processes afresh; empty the folder, or leave it out")
    return arguments


def main() -> None:
    a = parse_arguments()
    # Threads that spin long take the cores from the processes that read, threads that never spin wake too late
    # (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Batches vary in shape, and fixed segments of a GPU's memory would fill with holes.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Imported after the arguments are read, so that --help does not wait for torch.
    from tive.data.images import open_image
    from tive.data.records import chunk_range, open_records
    from tive.data.scan import scan_records
    from tive.features.chunk import Match
    from tive.features.dry_run import dry_run
    from tive.features.gradient_pass import PassOptions, compute_chunk
    from tive.features.launch import compute_open_chunks, place_of
    from tive.features.step import gradient_kind, load_step
    from tive.models import ModelFiles, family_of, pads_images
    from tive.models.checkpoint import base_folder
    from tive.util.device import device_of, dtype_of

    place = place_of(a.num_chunks, a.chunk_idx, os.environ)
    device = device_of(a.device, place.local_rank)
    files = ModelFiles(
        model_path=a.model_path,
        model_base=base_folder(a.model_base),
        vision_tower=a.vision_tower,
        chat_template=a.chat_template,
        max_length=a.max_length,
        max_pixels=a.max_pixels,
        load_in_4bit=a.load_in_4bit,
    )
    family = family_of(files)
    family.check_files(files)
    kind = "adam_release" if a.adam_form == "release" else a.gradient
    gradient = gradient_kind(a.model_path, kind, a.optimizer_state)
    has_gradient = a.gradient != "none"
    records = open_records(a.input_file)
    scan = scan_records(records, family.record_problem)
    whole = Match(
        chunk_idx=0,
        start=0,
        stop=len(records),
        num_chunks=place.num_chunks,
        data_sha256=records.fingerprint,
        data_records=len(records),
        model=family.identity(files),
        dtype=str(dtype_of(a.dtype, device)).removeprefix("torch."),
        gradient=gradient.name,
        optimizer_state=gradient.state.sha256 if gradient.state else None,
        checkpoint=gradient.step,
        grad_modules=a.grad_modules if has_gradient else "none",
        projector=None if a.projector == "auto" else a.projector,
        proj_seed=a.seed,
        proj_dim=a.proj_dim if has_gradient else 0,
        el2n=a.el2n or not has_gradient,
        visual_gain=a.visual_gain,
    )
    inputs = {name: getattr(a, name) for name in ("model_path", "model_base", "load_in_4bit")}
    inputs |= {"data_path": os.path.abspath(a.input_file), "image_folder": os.path.abspath(a.image_folder)}
    options = PassOptions(
        folder=Path(a.output_file),
        image_folder=a.image_folder,
        read_image=partial(open_image, padded=pads_images(files)) if a.check_images == "full" else None,
        skip_bad=a.on_bad_record == "skip",
        overwrite=a.overwrite,
        batch_size=a.batch_size,
        max_batch_tokens=a.max_batch_tokens,
        window=a.window,
        gradient_checkpointing=a.gradient_checkpointing,
        num_workers=a.num_workers,
        inputs=inputs | {"learning_rates": gradient.learning_rates},
    )
    # Once for all chunks, when the first needs it.
    load = cache(partial(load_step, family, files, device, whole, gradient, a.gradient_checkpointing))

    def compute(chunk_idx: int) -> None:
        rows = chunk_range(len(records), place.num_chunks, chunk_idx)
        match = replace(whole, chunk_idx=chunk_idx, start=rows.start, stop=rows.stop)
        name = f"chunk {chunk_idx} of {place.num_chunks} ({place.source})"
        print(f"{name}: {len(rows)} of {len(records)} records, from record {rows.start} on")
        if a.dry_run:
            dry_run(a.dry_run, scan, match, options, load)
        else:
            compute_chunk(name, scan, match, options, load)

    if place.chunk_idx is not None or a.dry_run:
        compute(place.chunk_idx or 0)
    else:
        compute_open_chunks(place.num_chunks, compute)


if __name__ == "__main__":
    run(main)
