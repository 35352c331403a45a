"""One page about a selection: what was drawn, and why; with the same plots as PNG files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tive.evaluation.results import read_evaluation
from tive.report import contents, tables, target
from tive.report.choice import choice_of
from tive.report.evaluation import evaluation
from tive.report.page import page
from tive.report.samples import Sample, extremes, open_checked, read_samples
from tive.report.sections import Pictures
from tive.selection.files import SUMMARY_END, Selection, find_summary, read_selection
from tive.util.errors import UserError, run
from tive.util.files import whole_file

EXAMPLE = """\
example:
  python scripts/report.py selected --image_folder playground/data
  writes selected/report.html (one file: send it, print it, open it offline) and selected/report_plots/*.png
"""


def main() -> None:
    arguments = parse_arguments()
    summary = find_summary(arguments.out, arguments.name)
    selection = read_selection(summary)
    evaluations = [read_evaluation(path) for path in arguments.evaluation]

    of_target = target.target_of(selection)
    ends = (
        target.extremes(selection, of_target, arguments.samples)
        if of_target
        else extremes(selection, arguments.samples)
    )
    samples, trouble = samples_of(selection, [row for end in ends for row in end.rows], arguments)
    records = tables.records(selection, ends, samples, trouble)

    pictures = Pictures()
    choice = None if of_target else choice_of(selection)
    if of_target:
        sections = contents.of_less(selection, of_target, records, pictures)
    else:
        sections = contents.of_tive(selection, choice, records, pictures)
    if evaluations:
        sections.insert(0, evaluation(evaluations))
    html = page(selection, choice, sections)
    pictures.bar.close()
    output = arguments.output or default_output(summary)
    plots = output.with_name(f"{output.stem}_plots")
    for name, content in pictures.files.items():
        with whole_file(plots / name) as file:
            file.write(content)
    with whole_file(output) as file:
        file.write(html)
    print(f"{output} ({len(html) / 2**20:.1f} MiB) and {len(pictures.files)} plots in {plots}")


def default_output(summary: Path) -> Path:
    """report.html beside the selection; where several selections lie together, each has its own."""
    several = len(list(summary.parent.glob(f"*{SUMMARY_END}"))) > 1
    return summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}_report.html" if several else "report.html")


def samples_of(selection: Selection, rows: list[int], arguments: argparse.Namespace) -> tuple[dict[int, Sample], str]:
    """What to show of the records of `rows`, and why none could be read."""
    if not rows:
        return {}, ""
    try:
        records = open_checked(selection, arguments.data_path)
    except UserError as error:
        if arguments.data_path:
            raise
        print(f"without images and conversations: {error}", file=sys.stderr)
        return {}, str(error)
    return read_samples(records, rows, arguments.image_folder or selection.summary.inputs.image_folder), ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="--save_path of the selection, or one _summary.json in it"
    )
    parser.add_argument("--name", metavar="STEM", help="which selection, when OUT holds several: Tive_q_0.001_p_0.15")
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
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples} is negative; give 0 for none")
    if arguments.image_folder is not None and not Path(arguments.image_folder).is_dir():
        raise UserError(
            f"--image_folder {arguments.image_folder} is not a folder; name the one that record images lie in"
        )
    return arguments


if __name__ == "__main__":
    run(main)
