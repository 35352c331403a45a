"""Run a program up to where its own parser has taken the arguments: `python parse_only.py SCRIPT ARGUMENT...`.

It stands in for `python`, `torchrun`, `sbatch` and other trainers' programs where a page's command cannot run: without
GPUs, a cluster, the real data or that trainer. Exit code 0 says that the parser took every argument.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]
# Programs of other trainers, which are fetched without what they stand on: where their arguments are declared.
TRAINERS = {
    "llamafactory-cli": ("llamafactory.hparams.parser", "_TRAIN_ARGS"),
    "swift": ("swift.arguments", "SftArguments"),
}
# What those files import and the parser does not need; it is in neither environment.
ABSENT = ("omegaconf", "modelscope", "json_repair", "aiohttp")
_parse_known_args = argparse.ArgumentParser.parse_known_args


def parsed(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> NoReturn:
    _, unknown = _parse_known_args(self, *arguments, **named)
    # The check before LLaVA's trainer looks at some of its arguments; the trainer's own parser takes them all.
    if unknown and self.prog != "tive.training":
        sys.exit(f"{sys.argv[0]} has no argument {unknown[0]}")
    print("parsed:", *sys.argv)
    sys.exit(0)


def run(program: str, arguments: list[str]) -> None:
    """Take the arguments of a program: a launcher's are parsed by the launcher, then those of what it launches."""
    name = Path(program).name
    if name == "-":  # a text from a shell script, which prints what a run has made
        return
    if name == "gpus.py":  # a machine with eight GPUs
        print(len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")), 9)
    elif name == "torchrun":
        from torch.distributed.run import parse_args

        launched = parse_args(arguments)
        run(launched.training_script, launched.training_script_args)
    elif name in TRAINERS:
        parse_as_trainer(*TRAINERS[name], arguments[1:])
    elif name == "sbatch":
        (script,) = [place for place, word in enumerate(arguments) if word.endswith(".sbatch")]
        run(str(ROOT / "compute_gradient_features.py"), arguments[script + 1 :])
    elif name in ("-m", "run_module.py"):
        if arguments[0] == "torch.distributed.run":
            run("torchrun", arguments[1:])
            return
        sys.argv = arguments
        argparse.ArgumentParser.parse_known_args = parsed  # type: ignore[method-assign, assignment]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(Path(program).resolve().parent))
        argparse.ArgumentParser.parse_known_args = parsed  # type: ignore[method-assign, assignment]
        runpy.run_path(program, run_name="__main__")
        sys.exit(f"{program} parsed no arguments")


class Absent(MetaPathFinder, Loader):
    """Makes empty modules of what is in `ABSENT` and below."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__spec__=spec, __path__=[], __version__="0")

    def exec_module(self, module: Any) -> None:
        pass


def parse_as_trainer(module: str, name: str, arguments: list[str]) -> None:
    """Have another trainer's own parser take the arguments of its program."""
    from transformers import HfArgumentParser

    import tive.models.common  # noqa: F401 - makes torchvision importable

    sys.meta_path.append(Absent())
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # LLaMA-Factory's, of the libraries beside it
    _, unknown = HfArgumentParser(getattr(importlib.import_module(module), name)).parse_known_args(arguments)
    if unknown:
        sys.exit(f"{module} has no argument {unknown[0]}")
    print("parsed:", *arguments)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
