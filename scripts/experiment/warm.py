"""A Python that has loaded torch, transformers and LLaVA once: what it is asked to run, it runs in a fork of itself.

Half of a training of the experiment would be imports. `served()` gives a program that stands in for Python:
`PROGRAM script.py ARGUMENT...` runs the script as Python would, with the caller's folder, environment and output, and
ends with its exit code. The commands of the project are run through it, none is changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tive.util.errors import UserError


@contextlib.contextmanager
def served() -> Iterator[Path]:
    """Start the server; yields the program that stands in for Python."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        address, program = Path(folder) / "socket", Path(folder) / "python"
        client = Path(__file__).with_name("warm_client.py")
        command = shlex.join([sys.executable, "-E", "-s", "-S", str(client), str(address)])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o755)
        server = subprocess.Popen([sys.executable, "-m", __name__, str(address)], start_new_session=True)
        try:
            while not address.exists():
                if server.poll() is not None:
                    raise UserError(f"the server of the experiment ended with code {server.returncode}; see above")
                time.sleep(0.1)
            yield program
        finally:
            # With everything that it runs.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def serve(address: str) -> None:
    """Take requests for ever, each in a fork."""
    import llava.train.train
    import transformers.trainer  # noqa: F401

    import tive.evaluation.run
    import tive.models.llava  # noqa: F401

    # transformers asks for the version of Pillow at every image.
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    # A training reads and encodes each record once, not once an epoch: nothing in that is random.
    dataset = llava.train.train.LazySupervisedDataset
    dataset.__getitem__ = functools.cache(dataset.__getitem__)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen(64)
        os.rename(f"{address}.new", address)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = _run(connection)
                connection.sendall(str(code).encode())
                os._exit(code)
            connection.close()


def _run(connection: socket.socket) -> int:
    """Read a request and do it; the exit code that Python would have ended with."""
    message, outputs, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    while part := connection.recv(1 << 16):
        message += part
    request = json.loads(message)
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
        os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
