"""What counting fewer LoRA matrices saves in the gradient step, and what it costs in fidelity."""

from __future__ import annotations

import time

import numpy as np

from tive.gradient_pass.batches import BatchLimits

from .gradients import Case, make_engine


def compare_matrices(case: Case) -> None:
    """Print what counting fewer LoRA matrices saves, and the rank correlations with counting self_attn everywhere."""
    records = {number: case.encode(number) for number in range(len(case.tasks))}
    layers = len(case.reference.model.model.layers)
    variants = [
        ("self_attn", None),
        ("self_attn", layers // 2),
        ("self_attn", 1),
        ("q_proj,v_proj", None),
        ("all", None),
    ]
    tasks = np.array(case.tasks)
    base = None
    print(f"{'--grad_modules':<15} {'--last_layers':>13} {'ms/record':>9} {'influence':>9} {'task value':>10}")
    for grad_modules, last_layers in variants:
        engine = make_engine(case, grad_modules, last_layers)
        engine.compute([records[0]])
        begin = time.perf_counter()
        limits = BatchLimits(case.arguments.batch_size, case.arguments.max_batch_tokens)
        results = engine.compute_all(records, limits)
        cost = (time.perf_counter() - begin) / len(records) * 1000
        features = np.stack([results[number][0].float().numpy() for number in records])
        norms = np.array([float(results[number][1]) for number in records])
        influence, values = scores(features, norms, tasks)
        base = base or (influence, values)
        same = np.mean([rank_correlation(influence[tasks == t], base[0][tasks == t]) for t in np.unique(tasks)])
        print(
            f"{grad_modules:<15} {last_layers or 'all':>13} {cost:>9.1f} {same:>9.3f} "
            f"{rank_correlation(values, base[1]):>10.3f}"
        )


def scores(features: np.ndarray, norms: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Influence of each record on its task `[n]`, and the value of each task `[tasks]`."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    influence = np.empty(len(tasks))
    values = []
    for task in np.unique(tasks):
        inside = tasks == task
        influence[inside] = unit[inside] @ unit[inside].mean(axis=0)
        values.append(norms[inside].mean())
    return influence, np.array(values)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation (no ties are expected)."""
    if len(first) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])
