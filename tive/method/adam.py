"""The gradient as Adam would apply it (LESS, arXiv 2402.04333, section 3.1), for every record of a batch.

Symbols: `g` the gradient of one record's own mean loss, `m` and `v` Adam's moments after step `t` of the checkpoint,
`b1` and `b2` their decays, `eps` the number that keeps the denominator from zero. One record moves the moments to

    m' = b1 m + (1 - b1) g,    v' = b2 v + (1 - b2) g^2,

and what Adam would take from the weights next is `adam_step` times the learning rate. Neither weight decay nor clipping
is part of it. All is float32, each matrix by itself.
"""

from __future__ import annotations

from torch import Tensor

# LESS's code fixes these, whatever the checkpoint was trained with.
RELEASE_B1, RELEASE_B2, RELEASE_EPS = 0.9, 0.999, 1e-8


def moved_moments(g: Tensor, m: Tensor, v: Tensor, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """`m' = b1 m + (1 - b1) g` and `v' = b2 v + (1 - b2) g^2`, both float32 `[B, out, in]`.

    Args:
        g: float32 `[B, out, in]`, each record's gradient.
        m, v: float32 `[out, in]`.
    """
    return g.mul(1 - b1).add_(m, alpha=b1), g.square().mul_(1 - b2).add_(v, alpha=b2)


def adam_step(g: Tensor, m: Tensor, v: Tensor, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """`[m' / (1 - b1^(t+1))] / [sqrt(v' / (1 - b2^(t+1))) + eps]`: the paper's, and AdamW's own next step.

    Args:
        g: float32 `[B, out, in]`.
        m, v: float32 `[out, in]`, after step `t`.
        betas: `b1` and `b2`.

    Returns:
        float32 `[B, out, in]`.
    """
    b1, b2 = betas
    m, v = moved_moments(g, m, v, b1, b2)
    denominator = v.div_(1 - b2 ** (t + 1)).sqrt_().add_(eps)
    return m.div_(1 - b1 ** (t + 1)).div_(denominator)


def release_step(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """`m' / sqrt(v' + 1e-8)` with b1 = 0.9 and b2 = 0.999: what LESS's code computes, without bias correction.

    `eps` under the root keeps the denominator above 1e-4. The roots of real second moments are often smaller, so the
    result is close to the momentum alone. Shapes are those of `adam_step`.
    """
    m, v = moved_moments(g, m, v, RELEASE_B1, RELEASE_B2)
    return m.div_(v.add_(RELEASE_EPS).sqrt_())
