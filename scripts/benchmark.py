"""Measure the two steps that cost time, on this machine."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the gradient step sets it
from tive.util.errors import run

BENCHMARKS = {
    "selection": "influence in two linear passes against the all-pairs way, from 10K to 1M records",
    "gradients": "projected per-record gradients: this step, one record at a time, and what neither can cost less than",
    "projection": "what the projections keep of real gradients' inner products, over several seeds",
    "memory": "what the gradient step needs beside the model and its activations, at LLaVA-7B's shape",
}
EXAMPLES = """
examples:
  python scripts/benchmark.py selection
  python scripts/benchmark.py gradients --text 512 6 128
  python scripts/benchmark.py projection --help
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, about in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if name in sys.argv[1:2]:  # only the chosen benchmark needs its libraries
            chosen = importlib.import_module(f"benchmark.{name}")
            chosen.add_arguments(command)
    arguments = parser.parse_args()
    chosen.run(arguments)


if __name__ == "__main__":
    run(main)
