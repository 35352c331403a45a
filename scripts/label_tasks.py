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
from tive.data.media import IMAGE_KEYS, is_empty, name_of_image
from tive.data.problems import listing_beside, refuse_bad_records
from tive.data.records import Records, TableRecords, check_suffix, name_of, open_records, write_records, write_texts
from tive.data.scan import described_keys
from tive.data.tasks import Rules, add_key, no_task, read_rules, replace_key, task_or_problem
from tive.util.errors import UserError, run
from tive.util.files import refuse_target
from tive.util.text import listed, print_table, shown, shown_value

DEFAULT_RULES = Path(__file__).resolve().parent / "rules" / "llava_v1_5.yaml"
OWN_KEYS = ("id", "conversations", "messages", "texts", "prompt", "completion", *IMAGE_KEYS)
UNMATCHED = "(no rule matches)"
SHOWN = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python scripts/label_tasks.py --source_path llava_v1_5_mix665k.json --target_path llava_labelled.json

The target has the source's form: JSON byte for byte with one key more, Parquet with one column more.
Data that names its tasks itself needs no labels: give the other scripts `--task_key KEY` instead, where KEY is a
key, a dotted path (meta.source), or the first part of a value (image:/ is the image's folder, id:_ the id up to _).""",
    )
    parser.add_argument("--source_path", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder")
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
    arguments = parser.parse_args()
    refuse_target(arguments.source_path, arguments.target_path)
    if arguments.task_key in OWN_KEYS or ":" in arguments.task_key or not arguments.task_key:
        raise UserError(
            f"--task_key {shown_value(arguments.task_key)} cannot hold the task; name a key of its own, such as dataset"
        )
    if arguments.default == "":
        raise UserError("--default is empty; give the task of the records that are left over a name")
    return arguments


@dataclass
class Labels:
    """The task of every record by the rules, and what is worth telling of them.

    Attributes:
        tasks: of each record; `UNMATCHED` where no rule matches and there is no default.
        kept: rows whose task is the one that they had; `with_key` those that had the key at all.
        unmatched: rows that no rule matches.
    """

    tasks: list[str] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    with_key: set[int] = field(default_factory=set)
    unmatched: list[int] = field(default_factory=list)


def labels_of(arguments: argparse.Namespace, records: Records, rules: Rules) -> Labels:
    """The task of every record.

    Raises:
        UserError: a record has a task already, or records cannot be read by rules (all are listed beside the target).
    """
    key, labels, problems = arguments.task_key, Labels(), {}
    for row, record in enumerate(records):
        task, named = None, None
        try:
            task = rules.task_of(record, arguments.split_llava)
            if arguments.existing == "keep":
                named, problem = task_or_problem(record, key)
                if problem and problem != no_task(key):
                    raise ValueError(f"{problem}; correct it, or give --existing replace")
            if key in record:
                labels.with_key.add(row)
        except ValueError as error:
            problems[row] = str(error)
        if arguments.existing == "stop" and row in labels.with_key and not is_empty(record[key]):
            name = f"{records.path}: {name_of(row, record)}"
            raise UserError(f"{name} has a `{key}` already; add --existing keep or replace, or another --task_key")
        if named is not None:
            labels.kept.add(row)
        elif task is None:
            labels.unmatched.append(row)
        labels.tasks.append(named or task or arguments.default or UNMATCHED)
    refuse_bad_records(records, problems, listing_beside(arguments.target_path))
    return labels


def write_labels(arguments: argparse.Namespace, records: Records, labels: Labels) -> None:
    """Write the records with their tasks: JSON byte for byte but for the key, a table with one column more."""
    key = arguments.task_key
    if isinstance(records, TableRecords):
        write_records(arguments.target_path, records, range(len(records)), {key: labels.tasks})
        return

    def texts() -> Iterator[bytes]:
        for row, text in enumerate(map(bytes, records.texts())):
            change = replace_key if row in labels.with_key else add_key
            yield text if row in labels.kept else change(text, key, labels.tasks[row])

    write_texts(arguments.target_path, texts(), records.is_lines)


def show(rules: Rules, records: Records, labels: Labels, split: bool) -> None:
    """Print the counts beside the authors' own, and the first records that no rule matched."""
    counts = Counter(labels.tasks)
    parts: dict[str, list[str]] = {rule.task: [] for rule in rules.rules}
    for rule in rules.rules if split else ():
        parts[rule.task] += [part.task for part in rule.split if part.task not in parts[rule.task]]
    rows: list[tuple[str, int, int | None]] = []
    for task, finer in parts.items():
        rows.append((task, counts[task] + sum(counts[part] for part in finer), rules.expected.get(task)))
        rows += [(f"  {part}", counts[part], None) for part in finer]
    known = {task.strip() for task, _, _ in rows}
    rows += [(task, counts[task], None) for task in sorted(counts) if task not in known]
    complete = len(rules.expected) == len(parts)
    rows.append(("all", counts.total(), sum(rules.expected.values()) if complete else None))
    table = [("task", "records", "authors", "difference")]
    for task, count, authors in rows:
        beside = (f"{authors:,}", f"{(count - authors) / authors:+.2%}") if authors else ("", "")
        table.append((task, f"{count:,}", *beside))
    print_table(table)
    far = [task for task, count, authors in rows if authors and abs(count - authors) > 0.01 * authors]
    if far:
        print(f"More than 1% off the authors' count: {listed(far)}. For the whole mixture, look at its records.")
    if labels.kept:
        print(f"{len(labels.kept):,} records kept the task that they had.")
    if labels.unmatched:
        print(f"No rule matches {len(labels.unmatched):,} records. The first:")
        for row in labels.unmatched[:SHOWN]:
            record = records[row]
            image = image_of(record)
            what = f"image {name_of_image(image)}" if image else "no image"
            print(f"  {shown(f'{name_of(row, record)}, {what}', 160)}")


def main() -> None:
    arguments = parse_arguments()
    rules = read_rules(arguments.rules)
    if arguments.split_llava and not any(rule.split for rule in rules.rules):
        raise UserError(f"--split_llava: {rules.path} has no rule with a `split`; leave the option out")
    records = open_records(arguments.source_path)
    check_suffix(arguments.target_path, records)
    labels = labels_of(arguments, records, rules)
    if unmatched := len(labels.unmatched) if arguments.default is None else 0:
        show(rules, records, labels, arguments.split_llava)
        remedy = "add a rule for them, or --default NAME"
        if 2 * unmatched > len(records):
            remedy = (
                "most are of another mixture: write rules for it, or give the steps --task_key with a key of the "
                f"records (they have {described_keys(records)})"
            )
        raise UserError(
            f"{unmatched:,} of {len(records):,} records match no rule of {rules.path}, nothing was written; {remedy}"
        )
    write_labels(arguments, records, labels)
    show(rules, records, labels, arguments.split_llava)
    print(f"Wrote {arguments.target_path}.")


if __name__ == "__main__":
    run(main)
