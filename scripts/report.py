"""One page about a selection: what was drawn, and why; with the same plots as PNG files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tive.data.records import open_records
from tive.evaluation.results import Evaluation, read_stored
from tive.report.comparison import comparison, evaluations
from tive.report.page import Samples, write_page
from tive.report.sections import selection_sections
from tive.selection.output import SUMMARY_END, Selection, find_summaries, read_selection
from tive.util.errors import UserError, run
from tive.util.files import refuse_target
from tive.util.text import percent, plural, shown

EXAMPLE = """\
examples:
  python scripts/report.py selected --image_folder playground/data
  writes selected/report.html (one file: send it, print it, open it offline) and selected/report_plots/*.png
  python scripts/report.py selected --all
  writes selected/comparison.html: what several selections of the same data took, how far they overlap
"""


def main() -> None:
    arguments = parse_arguments()
    summaries = find_summaries(arguments.out)
    if arguments.all:
        if len(summaries) < 2:
            raise UserError(f"{arguments.out} holds one selection; give the folder of several, or leave --all out")
        selections = [read_selection(path) for path in summaries]
        about = f"{len(selections)} selections in {arguments.out}"
        output = arguments.output or arguments.out / "comparison.html"
        write_page(output, "Selections compared", about, [], comparison(selections))
        return
    summary = chosen(summaries, arguments)
    selection = read_selection(summary)
    results = [read_stored(path, Evaluation) for path in arguments.evaluation]
    samples = open_samples(selection, arguments.samples, arguments.data_path, arguments.image_folder)
    if samples.trouble:
        print(f"without images and conversations: {samples.trouble}", file=sys.stderr)
    sections = selection_sections(selection, samples)
    if results:
        sections.insert(0, evaluations(results))
    write_page(arguments.output or default_output(summary), *header_of(selection), sections)


def chosen(summaries: Sequence[Path], arguments: argparse.Namespace) -> Path:
    """The one selection that is asked for; else prints the names of all."""
    stems = {path.name.removesuffix(SUMMARY_END): path for path in summaries}
    if arguments.name is None and len(stems) == 1:
        return summaries[0]
    if arguments.name in stems:
        return stems[arguments.name]
    for stem in stems:
        print(stem, file=sys.stderr)
    which = f"no selection {arguments.name}" if arguments.name else "several selections"
    raise UserError(f"{arguments.out} holds {which}; choose one of those above with --name, or compare them with --all")


def open_samples(selection: Selection, count: int, data_path: str | None, image_folder: str | None) -> Samples:
    """The data file that the selection was made from, at `data_path` or where it lay then, to show records of; a
    `UserError` where `data_path` is not that file.
    """
    inputs = selection.summary.inputs
    path = data_path or inputs.data_path
    if not count:
        return Samples(0)
    try:
        records = open_records(path)
        if records.fingerprint != inputs.data_sha256 or len(records) != len(selection.ids):
            raise UserError(f"{path} is not the file the selection was made from (SHA-256); name it (data_path)")
    except (UserError, ValueError) as error:
        if data_path:
            raise
        return Samples(count, trouble=shown(str(error), 400))
    return Samples(count, records, image_folder or inputs.image_folder)


def header_of(selection: Selection) -> tuple[str, str, list[tuple[str, str]]]:
    """The page's heading, what the selection was made from, and its numbers."""
    selected, total = sum(task.selected for task in selection.tasks), len(selection.ids)
    tiles = [
        (f"{selected:,}", f"records selected of {total:,}"),
        (percent(selected / max(1, total)), "of the data"),
        (f"{len(selection.tasks):,}", "tasks" if len(selection.tasks) > 1 else "task"),
        (f"{len(selection.summary.left_out):,}", "left out"),
    ]
    file = Path(selection.summary.inputs.data_path).name
    about = f"{selection.stem}, from {shown(file, 80)}, {plural(total, 'record')}"
    return f"What {selection.summary.method} selected", about, tiles


def default_output(summary: Path) -> Path:
    """report.html beside the selection; where several selections lie together, each has its own."""
    several = len(list(summary.parent.glob(f"*{SUMMARY_END}"))) > 1
    return summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}_report.html" if several else "report.html")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="--save_path of the selection, or one _summary.json in it"
    )
    parser.add_argument("--name", metavar="STEM", help="which selection, when OUT holds several: Tive_q_0.001_p_0.15")
    parser.add_argument("--all", action="store_true", help="one page that compares all selections in OUT")
    parser.add_argument("--image_folder", metavar="DIR", help="where the images lie (default: as in the gradient step)")
    parser.add_argument("--data_path", metavar="FILE", help="where the data file lies, if it was moved")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html beside the selection)"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation.json of scripts/evaluate.py, or its folder: what models trained on selections do",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="records shown at each end of a task, or of a subtask of a target (default: 3)",
    )
    arguments = parser.parse_args()
    if arguments.output:
        refuse_target(arguments.out, arguments.output)
    if arguments.all and (arguments.name or arguments.evaluation):
        raise UserError("--all compares all selections; leave --name and --evaluation out, or --all")
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples} is negative; give 0 for none")
    if arguments.image_folder is not None and not Path(arguments.image_folder).is_dir():
        raise UserError(
            f"--image_folder {arguments.image_folder} is not a folder; name the one that record images lie in"
        )
    return arguments


if __name__ == "__main__":
    run(main)
