"""Add the name of its task to every record of a mixture that names none.

The public mixtures lack the `dataset` key that task-wise selection needs. Rules tell each record's task from its image
folder, its formatting prompt and its number of questions, and the counts are printed beside the authors' own. The rules
are data: copy scripts/rules/llava_v1_5.yaml for a mixture of your own.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tive.data.labels import Rules, add_key, read_rules, replace_key, shape_problem
from tive.data.media import IMAGE_KEYS
from tive.data.records import image_of, name_of, task_of
from tive.data.stream import is_json_lines, stream_records, write_raw
from tive.util.errors import UserError, run
from tive.util.files import refuse_same_file

DEFAULT_RULES = Path(__file__).resolve().parent / "rules" / "llava_v1_5.yaml"
OWN_KEYS = ("id", *IMAGE_KEYS, "conversations")
SHOWN = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python scripts/label_tasks.py --source_path llava_v1_5_mix665k.json --target_path llava_labelled.json

The target has the source's form (a JSON list, or JSON Lines) and its records byte for byte, with one key more.
Data that names its tasks itself needs no labels: give the other scripts `--task_key KEY` instead, where KEY is a
key, a dotted path (meta.source), or the first part of a value (image:/ is the image's folder, id:_ the id up to _).""",
    )
    parser.add_argument("--source_path", required=True, help="records: a JSON list, or JSON Lines")
    parser.add_argument("--target_path", required=True, help="where the labelled records go; another file")
    parser.add_argument("--rules", default=DEFAULT_RULES, help="rule file (default: scripts/rules/llava_v1_5.yaml)")
    parser.add_argument(
        "--split_llava", action="store_true", help="split LLaVA-Instruct: conversation, detail, reasoning"
    )
    parser.add_argument(
        "--default", metavar="NAME", help="task of the records that no rule matches (default: an error)"
    )
    parser.add_argument("--task_key", default="dataset", help="the key to write (default: %(default)s)")
    parser.add_argument(
        "--existing",
        choices=("stop", "keep", "replace"),
        default="stop",
        help="what happens to a record that has the key already (default: %(default)s)",
    )
    return parser.parse_args()


@dataclass
class Tally:
    """What the pass found: records of each task, those that no rule matched (the first few named), those kept."""

    tasks: Counter[str] = field(default_factory=Counter)
    unmatched: int = 0
    first_unmatched: list[str] = field(default_factory=list)
    kept: int = 0


def check(arguments: argparse.Namespace, rules: Rules) -> None:
    refuse_same_file(arguments.source_path, arguments.target_path)
    if arguments.task_key in OWN_KEYS or ":" in arguments.task_key or not arguments.task_key:
        raise UserError(
            f"--task_key {arguments.task_key!r} cannot hold the task; name a key of its own, such as dataset"
        )
    if arguments.default == "":
        raise UserError("--default is empty; give the task of the records that are left over a name")
    if arguments.split_llava and not any(rule.split for rule in rules.rules):
        raise UserError(f"--split_llava: {rules.path} has no rule with a `split`; leave the option out")


def labelled(arguments: argparse.Namespace, rules: Rules, tally: Tally) -> Iterator[bytes]:
    """Yield the raw text of every record with its task, counting on the way.

    Raises:
        UserError: a record cannot be read by rules, has a task already, or matches no rule and there is no default.
    """
    key = arguments.task_key
    for row, (_, raw, record) in enumerate(stream_records(arguments.source_path)):
        name = name_of(arguments.source_path, row, record)
        problem = shape_problem(record)
        if problem:
            raise UserError(f"{name} {problem}; repair or remove it")
        if key in record and arguments.existing == "stop":
            raise UserError(f"{name} has a `{key}` already; add --existing keep or replace, or another --task_key")
        named = task_of(record, key) if arguments.existing == "keep" else None
        if named is not None:
            tally.kept += 1
            tally.tasks[named] += 1
            yield raw
            continue
        task = rules.task_of(record, arguments.split_llava)
        if task is None:
            tally.unmatched += 1
            if len(tally.first_unmatched) < SHOWN:
                image = image_of(record)
                tally.first_unmatched.append(f"{name}, " + (f"image {image}" if image else "no image"))
            task = arguments.default or "(no rule matches)"
        tally.tasks[task] += 1
        yield (replace_key if key in record else add_key)(raw, key, task)
    if not tally.tasks:
        raise UserError(f"{arguments.source_path} holds no records; name a data file with at least one")
    if tally.unmatched and arguments.default is None:
        show(rules, tally, arguments.split_llava)
        raise UserError(
            f"{tally.unmatched:,} of {tally.tasks.total():,} records match no rule of {rules.path}, nothing was "
            "written; add a rule for them, or --default NAME"
        )


def show(rules: Rules, tally: Tally, split: bool) -> None:
    """Print the counts beside the authors' own, and the first records that no rule matched."""
    rows = []
    for task, parts in rules.parts().items():
        parts = list(dict.fromkeys(parts)) if split else []
        rows.append((task, tally.tasks[task] + sum(tally.tasks[part] for part in parts), rules.expected.get(task)))
        rows += [(f"  {part}", tally.tasks[part], None) for part in parts]
    known = [task.strip() for task, _, _ in rows]
    rows += [(task, tally.tasks[task], None) for task in sorted(tally.tasks) if task not in known]
    complete = len(rules.expected) == len(rules.parts())
    rows.append(("all", tally.tasks.total(), sum(rules.expected.values()) if complete else None))
    width = max(len(task) for task, _, _ in rows)
    print(f"{'task':{width}}  {'records':>9}  {'authors':>9}  difference".rstrip())
    for task, count, authors in rows:
        beside = f"  {authors:9,}  {(count - authors) / authors:+10.2%}" if authors else ""
        print(f"{task:{width}}  {count:9,}{beside}")
    far = [task for task, count, authors in rows if authors and abs(count - authors) > 0.01 * authors]
    if far:
        print(f"More than 1% off the authors' count: {', '.join(far)}. For the whole mixture, look at its records.")
    if tally.kept:
        print(f"{tally.kept:,} records kept the task that they had.")
    if tally.unmatched:
        print(f"No rule matches {tally.unmatched:,} records. The first:")
        for line in tally.first_unmatched:
            print(f"  {line}")


def main() -> None:
    arguments = parse_arguments()
    rules = read_rules(arguments.rules)
    check(arguments, rules)
    tally = Tally()
    lines = is_json_lines(arguments.source_path)
    write_raw(arguments.target_path, labelled(arguments, rules, tally), lines)
    show(rules, tally, arguments.split_llava)
    print(f"Wrote {arguments.target_path}.")


if __name__ == "__main__":
    run(main)
