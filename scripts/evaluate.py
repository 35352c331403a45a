"""Compare trained models on held-out records: mean loss and share of answers produced exactly, task by task."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path

from tive.util.errors import UserError, run

EXAMPLES = """
put records aside before anything is selected, then compare what was trained on the rest:
  python scripts/split_data.py --source_path data.json --target_path split --per_task 200
  python scripts/evaluate.py --input_file split/held_out.json --image_folder images --save_path evaluation \\
      --model all checkpoints/all --model tive checkpoints/tive --model reference checkpoints/warm-up-lora vicuna-7b

A model is NAME PATH for a whole model (finetune.sh, or a model that was downloaded) and NAME PATH BASE for an adapter.
The first one is what the others are relative to. Answers are generated greedily, with the true earlier turns before
them, and compared without case, articles and punctuation (docs/evaluation.md). Results of a model are kept in
--save_path and used again; a run that stops is continued by the same command.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input_file", required=True, help="held-out records: a JSON list, JSON Lines, Parquet or a folder")
    add("--image_folder", default="", help="folder that the records' image paths start from")
    add(
        "--model",
        required=True,
        action="append",
        nargs="+",
        metavar=("NAME PATH", "BASE"),
        help="a model to evaluate, by the name that the tables give it; once for each",
    )
    add("--save_path", required=True, type=Path, metavar="DIR", help="folder for the results")
    add("--max_new_tokens", type=int, default=32, help="most tokens of a generated answer; 0 for losses alone (32)")
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="default: by the device")
    add("--batch_size", type=int, default=16, help="most records in a batch (16)")
    add("--max_batch_tokens", type=int, default=16384, help="most tokens in a batch, with padding (16384)")
    add("--window", type=int, default=256, help="records computed and written as one; what a crash can cost (256)")
    add("--num_workers", type=int, help="processes that read and encode (4 beside a GPU, 1 beside a CPU)")
    add("--vision_tower", help="folder of the vision tower, where the path in the checkpoints is not there")
    add("--chat_template", metavar="FILE", help="instead of the models' own (transformers' models; docs/native.md)")
    add("--max_length", type=int, help="leave longer records out (transformers' models; none)")
    add("--load_in_4bit", action="store_true", help="the base in 4 bits (NF4), as QLoRA trains on it; docs/native.md")
    add("--max_pixels", type=int, help="make larger images smaller first (transformers' models; none)")
    add("--on_bad_record", default="stop", choices=("stop", "skip"), help="bad records and images: stop, or leave out")
    add("--overwrite", action="store_true", help="evaluate anew where results of another run have a model's name")
    arguments = parser.parse_args()
    for name in ("batch_size", "max_batch_tokens", "window", "max_length", "max_pixels"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is not a positive number")
    for name in ("max_new_tokens", "num_workers"):
        if (getattr(arguments, name) or 0) < 0:
            parser.error(f"--{name} {getattr(arguments, name)} is negative")
    names = [model[0] for model in arguments.model]
    for model in arguments.model:
        if not 2 <= len(model) <= 3:
            parser.error(f"--model {' '.join(model)}: give NAME PATH, or NAME PATH BASE for an adapter")
        if not re.fullmatch(r"[\w.-]{1,60}", model[0]) or names.count(model[0]) > 1:
            parser.error(f"--model {model[0]}: a name has letters, digits, dots and dashes, and each model its own")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Imported after the arguments are read, so that --help does not wait for torch.
    import msgspec

    from tive.data.problems import form_remedy, refuse_bad_records
    from tive.data.records import open_records
    from tive.data.scan import check_chunk, scan_records
    from tive.data.tasks import NO_TASK
    from tive.data.trained import record_hashes
    from tive.evaluation.results import (
        EVALUATION_FILE,
        INTERVAL,
        Conditions,
        Evaluation,
        ModelResult,
        known_results,
        read_stored,
        tables,
        task_results,
        write_result,
    )
    from tive.evaluation.run import COLUMNS, EvaluationOptions, evaluate, results_of, take_known
    from tive.features.launch import hold
    from tive.features.loader import workers_beside
    from tive.features.store import Store
    from tive.models import ModelFiles, family_of
    from tive.models.checkpoint import base_folder
    from tive.models.training_record import versions_of
    from tive.util.device import device_name, device_of, dtype_of
    from tive.util.text import print_table

    device = device_of(arguments.device)
    dtype = dtype_of(arguments.dtype, device)
    options = EvaluationOptions(
        image_folder=arguments.image_folder,
        batch_size=arguments.batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        window=arguments.window,
        num_workers=workers_beside(device, arguments.num_workers),
        max_new_tokens=arguments.max_new_tokens,
        skip_bad=arguments.on_bad_record == "skip",
    )

    data = open_records(arguments.input_file)
    content = [digest.tobytes().hex() for digest in record_hashes(data)]

    def result_of(name: str, path: str, base: str | None = None) -> ModelResult:
        files = ModelFiles(
            path,
            base and base_folder(base),
            arguments.vision_tower,
            chat_template=arguments.chat_template,
            max_length=arguments.max_length,
            max_pixels=arguments.max_pixels,
            load_in_4bit=arguments.load_in_4bit,
        )
        family = family_of(files)
        family.check_files(files)
        conditions = Conditions(
            data_sha256=data.fingerprint,
            data_records=len(data),
            model=family.identity(files),
            dtype=str(dtype).removeprefix("torch."),
            max_new_tokens=options.max_new_tokens,
            task_key=arguments.task_key,
        )
        target, begun = arguments.save_path / f"model_{name}.json", time.perf_counter()
        known = {} if arguments.overwrite else known_results(arguments.save_path, conditions)
        if target.exists() and not arguments.overwrite:
            stored = read_stored(target, ModelResult)
            were = msgspec.structs.asdict(stored.conditions)
            differing = [key for key, value in msgspec.structs.asdict(conditions).items() if were[key] != value]
            if not differing:
                print(f"{name}: {target} is there")
                return stored
            # Results of data that was relabelled, reordered or has grown are all in the new ones.
            kept = {record.content for record in stored.records if record.loss is not None}
            if not kept <= known.keys() & set(content):
                raise UserError(
                    f"{target} has another {' and another '.join(differing).replace('_', ' ')}, and holds results that "
                    "would be lost; take another name for the model, which computes only what is not known, or "
                    "--overwrite"
                )
        scan = scan_records(data, family.record_problem, arguments.task_key)
        checked = check_chunk(scan, range(len(data)), options.image_folder)
        if not options.skip_bad:
            remedy = form_remedy(data, checked.reasons) or (
                "repair them, name the key that holds the task (task_key), or leave such records out (on_bad_record "
                "skip)"
            )
            refuse_bad_records(data, checked.reasons, arguments.save_path / "bad_records.json", remedy)
        progress = arguments.save_path / f".model_{name}.progress"
        with hold(progress / "lock", f"evaluating into {progress.name}"):
            store = Store(progress, range(len(data)), msgspec.to_builtins(conditions), COLUMNS)
            print(f"{name}: {path}")
            if taken := take_known(store, content, known, checked.reasons):
                print(f"{name}: {taken:,} of {len(data):,} records were evaluated before; their results are taken")
            if store.missing(options.window):
                evaluate(family, family.load(files, device, dtype), scan, checked, options, store)
            records = results_of(name, store, content)
            tasks = task_results([task or NO_TASK for task in scan.tasks], records)
            seconds = time.perf_counter() - begun
            versions = versions_of(*family.LIBRARIES)
            result = ModelResult(name, path, base, conditions, device_name(device), seconds, tasks, records, versions)
            write_result(target, result)
            shutil.rmtree(store.folder)
        return result

    models = [result_of(*model) for model in arguments.model]
    evaluation = Evaluation(arguments.input_file, models)
    write_result(arguments.save_path / EVALUATION_FILE, evaluation)
    for title, rows in tables(evaluation).items():
        print(f"{title}; {INTERVAL}")
        print_table(rows)
    print(f"written: {arguments.save_path / EVALUATION_FILE}")


if __name__ == "__main__":
    run(main)
