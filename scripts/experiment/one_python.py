"""Run scripts one after the other in one Python: `one_python.py SCRIPT ARGUMENT... --then SCRIPT ARGUMENT...`.

A trained model is evaluated without loading torch and LLaVA again, and a training encodes each record once.
"""

import functools
import importlib.metadata
import runpy
import sys
from itertools import groupby
from pathlib import Path

import llava.train.train

# transformers asks for the version of Pillow at every image.
importlib.metadata.version = functools.cache(importlib.metadata.version)
# A training reads and encodes each record once, not once an epoch: nothing in that is random.
dataset = llava.train.train.LazySupervisedDataset
dataset.__getitem__ = functools.cache(dataset.__getitem__)

sys.path[0] = str(Path(__file__).resolve().parents[2])
for then, arguments in groupby(sys.argv[1:], lambda argument: argument == "--then"):
    if not then:
        sys.argv[:] = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
