"""Print the number of GPUs that torch sees and the first one's compute capability: `2 8`; `0 0` without one."""

from __future__ import annotations

import torch


def main() -> None:
    count = torch.cuda.device_count()
    print(count, torch.cuda.get_device_capability()[0] if count else 0)


if __name__ == "__main__":
    main()
