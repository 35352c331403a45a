"""Measure the two steps that cost time, on this machine.

examples:
  python scripts/benchmark.py selection
  python scripts/benchmark.py gradients --text 512 6 128
  python scripts/benchmark.py projection --help
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the gradient step sets it
from tive.util.errors import run

from benchmark import gradients, memory, projection, selection  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in (selection, gradients, projection, memory):
        name, about = module.__name__.rpartition(".")[2], str(module.__doc__)
        shown = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=about, description=about, formatter_class=shown)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    run(main)
