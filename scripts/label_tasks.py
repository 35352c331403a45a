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

from tive.data.conversations import image_of
from tive.data.labels import Rules, add_key, read_rules, replace_key
from tive.data.media import IMAGE_KEYS, is_empty
from tive.data.problems import convert_command, listing_beside, refuse_bad_records
from tive.data.records import JsonRecords, name_of, open_records, write_raw
from tive.data.scan import described_keys
from tive.data.tasks import no_task, task_or_problem
from tive.util.errors import UserError, run
from tive.util.files import refuse_same_file
from tive.util.text import listed, print_table, shown, shown_value

DEFAULT_RULES = Path(__file__).resolve().parent / "rules" / "llava_v1_5.yaml"
OWN_KEYS = ("id", "conversations", "messages", "texts", "prompt", "completion", *IMAGE_KEYS)
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
class Found:
    """What the pass found: records of each task, those that no rule matched (the first few named), those kept, and what
    keeps records from being labelled, by row."""

    tasks: Counter[str] = field(default_factory=Counter)
    unmatched: int = 0
    first_unmatched: list[str] = field(default_factory=list)
    kept: int = 0
    problems: dict[int, str] = field(default_factory=dict)


def check(arguments: argparse.Namespace, rules: Rules) -> None:
    refuse_same_file(arguments.source_path, arguments.target_path)
    if arguments.task_key in OWN_KEYS or ":" in arguments.task_key or not arguments.task_key:
        raise UserError(
            f"--task_key {shown_value(arguments.task_key)} cannot hold the task; name a key of its own, such as dataset"
        )
    if arguments.default == "":
        raise UserError("--default is empty; give the task of the records that are left over a name")
    if arguments.split_llava and not any(rule.split for rule in rules.rules):
        raise UserError(f"--split_llava: {rules.path} has no rule with a `split`; leave the option out")


def labelled(arguments: argparse.Namespace, records: JsonRecords, rules: Rules, found: Found) -> Iterator[bytes]:
    """Yield the raw text of every record with its task, counting on the way.

    Raises:
        UserError: a record has a task already, records cannot be read by rules (all are listed beside the target), or
            match no rule and there is no default.
    """
    key = arguments.task_key
    for row, (raw, record) in enumerate(zip(map(bytes, records.texts()), records, strict=True)):
        try:
            task = rules.task_of(record, arguments.split_llava)
        except ValueError as error:
            found.problems[row] = str(error)
            continue
        name = name_of(arguments.source_path, row, record)
        if not is_empty(record.get(key)) and arguments.existing == "stop":
            raise UserError(f"{name} has a `{key}` already; add --existing keep or replace, or another --task_key")
        named, without_task = task_or_problem(record, key) if arguments.existing == "keep" else (None, no_task(key))
        if named is None and without_task != no_task(key):
            found.problems[row] = f"{without_task}; correct it, or give --existing replace"
            continue
        if named is not None:
            found.kept += 1
            found.tasks[named] += 1
            yield raw
            continue
        if task is None:
            found.unmatched += 1
            if len(found.first_unmatched) < SHOWN:
                image = image_of(record)
                found.first_unmatched.append(f"{name}, " + (f"image {image}" if image else "no image"))
            task = arguments.default or "(no rule matches)"
        found.tasks[task] += 1
        yield (replace_key if key in record else add_key)(raw, key, task)
    listing = listing_beside(arguments.target_path)
    if found.problems:
        refuse_bad_records(records, found.problems, listing)
    listing.unlink(missing_ok=True)
    if found.unmatched and arguments.default is None:
        show(rules, found, arguments.split_llava)
        if 2 * found.unmatched > found.tasks.total():
            raise UserError(
                f"most records ({found.unmatched:,} of {found.tasks.total():,}) match no rule of {rules.path}: it is "
                "of another mixture, and nothing was written; write rules for this one, or give the steps --task_key "
                f"with a key of the records (they have {described_keys(records)})"
            )
        raise UserError(
            f"{found.unmatched:,} of {found.tasks.total():,} records match no rule of {rules.path}, nothing was "
            "written; add a rule for them, or --default NAME"
        )


def show(rules: Rules, found: Found, split: bool) -> None:
    """Print the counts beside the authors' own, and the first records that no rule matched."""
    rows: list[tuple[str, int, int | None]] = []
    for task, parts in rules.parts().items():
        parts = list(dict.fromkeys(parts)) if split else []
        rows.append((task, found.tasks[task] + sum(found.tasks[part] for part in parts), rules.expected.get(task)))
        rows += [(f"  {part}", found.tasks[part], None) for part in parts]
    known = [task.strip() for task, _, _ in rows]
    rows += [(task, found.tasks[task], None) for task in sorted(found.tasks) if task not in known]
    complete = len(rules.expected) == len(rules.parts())
    rows.append(("all", found.tasks.total(), sum(rules.expected.values()) if complete else None))
    table = [("task", "records", "authors", "difference")]
    for task, count, authors in rows:
        beside = (f"{authors:,}", f"{(count - authors) / authors:+.2%}") if authors else ("", "")
        table.append((task, f"{count:,}", *beside))
    print_table(table)
    far = [task for task, count, authors in rows if authors and abs(count - authors) > 0.01 * authors]
    if far:
        print(f"More than 1% off the authors' count: {listed(far)}. For the whole mixture, look at its records.")
    if found.kept:
        print(f"{found.kept:,} records kept the task that they had.")
    if found.unmatched:
        print(f"No rule matches {found.unmatched:,} records. The first:")
        for line in found.first_unmatched:
            print(f"  {shown(line, 160)}")


def main() -> None:
    arguments = parse_arguments()
    rules = read_rules(arguments.rules)
    check(arguments, rules)
    found = Found()
    records = open_records(arguments.source_path)
    if not isinstance(records, JsonRecords):
        raise UserError(
            f"{arguments.source_path} is a table, to which no key is added; give the steps --task_key with a column of "
            f"it (the records have {described_keys(records)}), or make JSON of it with {convert_command(records)}"
        )
    write_raw(arguments.target_path, labelled(arguments, records, rules, found), records.is_lines)
    show(rules, found, arguments.split_llava)
    print(f"Wrote {arguments.target_path}.")


if __name__ == "__main__":
    run(main)
