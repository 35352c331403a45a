"""Print the number of GPUs that torch sees and the first one's compute capability: `2 8`; `0 0` without one."""

import torch

count = torch.cuda.device_count()
print(count, torch.cuda.get_device_capability()[0] if count else 0)
