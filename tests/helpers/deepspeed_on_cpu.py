"""Run `tive.training.llava_trainer` under DeepSpeed on a machine without a GPU, so that tests reach it.

accelerate 0.21 takes DeepSpeed on CUDA alone: it is told of an initialised gloo group and of the CPU as the device.
"""

import importlib
import sys

import accelerate.state
import deepspeed

from tive.training.llava_trainer import main
from tive.util.errors import run

# It would be compiled, for minutes. `deepspeed.comm.torch` as an attribute is torch itself, as a module DeepSpeed's.
importlib.import_module("deepspeed.comm.torch")
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
accelerate.state.AcceleratorState.use_ipex = False
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
run(main)
