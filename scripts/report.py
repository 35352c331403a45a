"""One page about a selection: what was drawn, and why; with the same plots as PNG files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tive.evaluation.results import read_evaluation
from tive.report.comparison import comparison, evaluations
from tive.report.page import Pictures, render, write_page
from tive.report.samples import Sample, groups_of_tasks, open_checked, read_sample, records
from tive.report.sections import tive_sections
from tive.report.subtasks import groups_of_subtasks, less_sections, target_of
from tive.selection.reading import Selection, find_summaries, read_selection
from tive.selection.summary import SUMMARY_END
from tive.util.errors import UserError, run
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
        selections, pictures = [read_selection(path) for path in summaries], Pictures()
        sections = comparison(selections, pictures)
        about = f"{len(selections)} selections in {arguments.out}"
        html = render("Selections compared", about, [], sections)
        write_page(arguments.output or arguments.out / "comparison.html", html, pictures)
        return
    summary = chosen(summaries, arguments)
    selection = read_selection(summary)
    target = target_of(selection)
    results = [read_evaluation(path) for path in arguments.evaluation]

    samples, pictures = (arguments.samples, *reader(selection, arguments)), Pictures()
    if target:
        cards = records(selection, groups_of_subtasks(selection, target), *samples)
        sections = less_sections(selection, target, cards, pictures)
    else:
        columns = ["influence", *["visual_gain"] * ("visual_gain" in selection.numbers)]
        ends = [records(selection, groups_of_tasks(selection, column), *samples) for column in columns]
        sections = tive_sections(selection, ends, pictures)
    if results:
        sections.insert(0, evaluations(results))
    write_page(arguments.output or default_output(summary), render(*header_of(selection), sections), pictures)


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


def reader(selection: Selection, arguments: argparse.Namespace) -> tuple[Callable[[int], Sample], str]:
    """What reads a record for the page, and why none can be read."""
    trouble = ""
    if arguments.samples:
        try:
            file = open_checked(selection, arguments.data_path)
            folder = arguments.image_folder or selection.summary.inputs.image_folder
            return partial(read_sample, file, folder), ""
        except UserError as error:
            if arguments.data_path:
                raise
            trouble = str(error)
            print(f"without images and conversations: {error}", file=sys.stderr)
    return lambda row: Sample(None, "not read"), trouble


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
