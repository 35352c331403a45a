"""Run `tive.training.train` under DeepSpeed on a machine without a GPU, in one process, so that tests reach that path.

accelerate 0.21 takes DeepSpeed on CUDA alone: it is told of an initialised gloo group and of the CPU as the device.
"""

import accelerate.state
import deepspeed
import deepspeed.comm.torch

from tive.training.train import main
from tive.util.errors import run

deepspeed.comm.torch.build_shm_op = lambda: None  # would be compiled, for minutes
accelerate.state.AcceleratorState.use_ipex = False
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
run(main)
