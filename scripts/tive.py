"""Makes `tive` the folder above for the scripts here, in any Python; without the libraries it prints one line."""

from importlib.util import find_spec
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "tive")]

if find_spec("msgspec") is None:
    from tive.util.errors import refuse_python

    refuse_python("msgspec")
