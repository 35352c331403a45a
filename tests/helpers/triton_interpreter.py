"""The Triton kernel against torch, in Triton's interpreter, which must be chosen before Triton is imported."""

import torch

from tive.method import signs_triton
from tive.method.signs import TorchSigns, draw_signs, key_of

CPU = torch.device("cpu")
signs_triton._ROW_PARTS = 3  # the interpreter runs one part after another

for proj_dim, size, batch, seed in ((150, 300, 5, 7), (128, 64, 17, 1)):
    kernel = signs_triton.TritonSigns(seed, proj_dim, CPU)
    reference = TorchSigns(seed, proj_dim, CPU, size, 0)

    single, rows = torch.zeros(3, size), [0, size // 2, size - 1]
    single[range(3), rows] = 1.0
    signs = draw_signs(key_of(seed, "m"), 0, size, proj_dim).float()
    assert torch.equal(kernel.project("m", single), signs[rows]), "the signs differ"

    gradients = torch.randn(batch, size) * torch.logspace(-9, 3, batch)[:, None]
    expected = reference.project("m", gradients)
    error = (kernel.project("m", gradients) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-3, f"the sums differ by {error.max()}"
