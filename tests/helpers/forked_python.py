"""A Python whose libraries are imported already, for tests that start a script: seconds less for each.

Good for scripts that import those libraries; one that imports none starts as fast by itself.

`PYTHON` is a program that is called as an interpreter is. A script of this project, or `-m` and a module, runs in a new
process, forked from a server that has imported torch and the libraries and nothing of the project; it has the caller's
arguments, folder, environment, standard streams and signals, and its exit code comes back. Whatever could differ from a
fresh start is started afresh: other arguments (`-c`, `-X`), programs from elsewhere, output to a terminal, packages of
the libraries' names where Python would look first, and an environment that differs from the server's in what libraries
read while they are imported. One thing is another: forks
share the seed of Python's hashes.

tests/conftest.py starts the server, which imports nothing before it is first asked. Nothing but the standard library is
imported here: this file is the program too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
VARIABLE = "TESTS_FORKED_PYTHON"
# The stand-in, or the interpreter itself where no server was started.
PYTHON = os.environ.get(VARIABLE, sys.executable)
# The libraries that start slowly, in whatever environment they are; the first makes torchvision importable.
LIBRARIES = (
    *("tive.models.common", "torch._dynamo", "transformers.trainer", "peft", "accelerate"),
    *("llava.train.train", "trl", "datasets", "matplotlib.pyplot", "scipy.stats"),
)
# What libraries read while they are imported, by the beginning of its name.
READ_EARLY = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "TORCH_", "DS_", "MPL")
READ_EARLY += ("PYTHON", "LD_", "HOME", "XDG_", "TMPDIR", "LANG", "LC_", "NCCL_", "KMP_", "WANDB_", "BNB_", "USE_")
# But these are looked at in another way (PYTHONPATH), or later: by shell scripts, torchrun, the streams, CUDA.
BUT = ("PYTHON", "PYTHONPATH", "PYTHON_EXEC", "PYTHONUNBUFFERED", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
BUT += ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK")


def early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_EARLY) and name not in BUT}


def call(path: str, arguments: list[str]) -> int:
    """Have the server run a script, and wait; the exit code, negative for the signal that ended it.

    Ends as a start of the interpreter where the server does not run this.
    """
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m") or os.isatty(1) or os.isatty(2):
        start(arguments)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        data = json.dumps(request).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        answers = server.makefile()
        process = int(answers.readline() or sys.exit(f"the server has ended: see {os.path.dirname(path)}/log"))
        if process == -1:
            start(arguments)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(process, number))
        return int(answers.readline())


def start(arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, *arguments])


class Server:
    """Forks a process for each request; it has no thread, so that nothing of one is missing in a fork."""

    def __init__(self, path: str) -> None:
        self.environment = early(dict(os.environ))
        self.ready = False
        self.events = selectors.DefaultSelector()
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(path)
        self.listening.listen(64)
        self.events.register(sys.stdin, selectors.EVENT_READ)
        self.events.register(self.listening, selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """Answer until standard input ends; returns, in a fork, the script and its arguments."""
        while True:
            event = self.events.select()[0][0]
            if event.fileobj is sys.stdin:
                os._exit(0)
            if event.fileobj is not self.listening:
                self.end(*event.data)
            elif arguments := self.accept():
                return arguments

    def accept(self) -> list[str] | None:
        """Fork for the next request; returns, in the fork, the script and its arguments."""
        caller, _ = self.listening.accept()
        try:
            header, streams, _, _ = socket.recv_fds(caller, 8, 3)
            with caller.makefile("rb") as sent:
                request = json.loads(sent.read(int.from_bytes(header, "big")))
        except (OSError, ValueError):  # the caller was killed before it had said what it wants
            caller.close()
            return None
        process = -1
        if self.is_like_here(request):
            if not self.ready:
                import_libraries()
                self.ready = True
            process = os.fork()
            if process == 0:
                become(request, streams)
                return request["arguments"]
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):
            caller.sendall(f"{process}\n".encode())
        if process == -1:
            caller.close()
            return None
        ended = os.pidfd_open(process)
        for place in (caller, ended):
            self.events.register(place, selectors.EVENT_READ, (process, caller, ended))
        return None

    def is_like_here(self, request: dict[str, Any]) -> bool:
        """Whether a fork of this process is what a fresh start would be."""
        first = os.path.realpath(os.path.join(request["folder"], *request["arguments"][:1]))
        if request["arguments"][0] == "-m":
            first = request["folder"]
        elif first.startswith((f"{ROOT}{os.sep}", f"{os.path.realpath(sys.prefix)}{os.sep}")):
            first = os.path.dirname(first)
        else:
            return False
        places = [first, *places_of(request["environment"])]
        names = {f"{name.partition('.')[0]}{ending}" for name in LIBRARIES[1:] for ending in ("", ".py")}
        shadowed = any(os.path.exists(os.path.join(place, name)) for place in places for name in names)
        return not shadowed and early(request["environment"]) == self.environment

    def end(self, process: int, caller: socket.socket, ended: int) -> None:
        """Tell the caller how its process ended; where the caller was killed, so is the process."""
        done, status = os.waitpid(process, os.WNOHANG)
        if not done:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
        with contextlib.suppress(OSError):
            caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        for place in (caller, ended):
            self.events.unregister(place)
        caller.close()
        os.close(ended)


def import_libraries() -> None:
    """Import what there is of `LIBRARIES`, and forget what is the project's own."""
    before = sys.path[:]
    sys.path.insert(0, ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tive", "tests")]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # That of pyarrow's jemalloc prepares itself for a fork.
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]
    assert not others, f"a library has started threads, which no fork would have: {others}"


def places_of(environment: Mapping[str, str]) -> list[str]:
    return [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this fork the process that the caller meant to start."""
    inherited = places_of(os.environ)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.closerange(3, 4096)
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    script = request["arguments"][0]
    first = request["folder"] if script == "-m" else os.path.dirname(os.path.realpath(script))
    libraries = [place for place in sys.path[1:] if place not in inherited]
    sys.path[:] = [first, *places_of(os.environ), *libraries]


def main() -> list[str]:
    """The stand-in, called with the server's socket; or the server, which returns in each fork."""
    if sys.argv[1] == "--serve":
        return Server(sys.argv[2]).serve()
    code = call(sys.argv[1], sys.argv[2:])
    if code < 0:
        with contextlib.suppress(OSError):  # of SIGKILL there is no other
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run `SCRIPT ARGUMENT...` or `-m MODULE ARGUMENT...` as Python would; returns the exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    exit_code = run(main())
    # As the interpreter ends; but it would also take down the libraries' modules one by one, for half a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)
