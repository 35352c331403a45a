"""Run a module of the environment: `python run_module.py MODULE ARGUMENT...`.

`python -m` puts the working folder first among the places that packages are imported from: whoever stands in a
checkout of another LLaVA would train with that one. `python -P` is new in Python 3.11; a script's own folder comes
first instead of the working folder in every version, and this one holds nothing to import. The `tive` that is imported
is the one that this script lies beside.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    package = sys.argv[0].split(".")[0]
    if importlib.util.find_spec(package) is None:
        sys.exit(f"error: {sys.executable} has no {package}; run `bash scripts/setup.sh` (PYTHONPATH is not looked at)")
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while the module imports what it needs
        print("stopped", file=sys.stderr)
        sys.exit(130)
