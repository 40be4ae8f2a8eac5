from typing import Any

import numpy as np

from pipeline.benchmarks._records import row
from pipeline.benchmarks._scores import TOP, Scorer
from pipeline.signals.records import Record

NAMES = ("kl_to_teacher", "total_variation", "top1_agreement", f"top{TOP}_agreement")


def fidelity(model: Scorer, heldout: list[Record]) -> dict[str, Any]:
    """How near the model is to the cached teacher, per position at which their tokens begin at the same byte.

    KL(teacher || model) in nats, total variation, agreement of the most likely token and of the 5 most likely ones, over all
    positions, by specialty, by decile of the teacher's entropy and by position in the answer; and how the probabilities that
    the two give to what they hold to be the most likely go together (Pearson).
    """
    scores = model.scores(heldout)
    found = [(record, score.compared) for record, score in zip(heldout, scores or [], strict=True) if score.compared] if scores else []
    aligned = sum(compared.total[0] for _, compared in found)
    if not aligned:
        return dict.fromkeys(NAMES) | {"aligned_positions": 0, "confidence_correlation": None, "fidelity": None}
    total = np.sum([compared.total for _, compared in found], 0)
    by_specialty: dict[str, np.ndarray] = {}
    for record, compared in found:
        by_specialty[record.specialty or ""] = by_specialty.get(record.specialty or "", np.zeros(5)) + compared.total
    figures = _means(total)
    return {
        "aligned_positions": figures.pop("positions"),
        **figures,
        "confidence_correlation": _correlation(aligned, np.sum([compared.certainty for _, compared in found], 0)),
        "fidelity": {
            "by_specialty": {name: _means(sums) for name, sums in sorted(by_specialty.items(), key=lambda each: -each[1][0])},
            "by_entropy": [_means(sums) for sums in np.sum([compared.by_entropy for _, compared in found], 0)],
            "by_position": [_means(sums) | {"from": 2**n - 1} for n, sums in enumerate(np.sum([compared.by_position for _, compared in found], 0)) if sums[0]],
        },
        "records": [
            row(record, aligned=int(sums[0]), kl=float(sums[1]), total_variation=float(sums[2]), agreeing=int(sums[3]), top_agreeing=float(sums[4]))
            for record, compared in found
            for sums in [compared.total]
        ],
    }


def _means(sums: np.ndarray) -> dict[str, Any]:
    means = sums[1:] / sums[0] if sums[0] else [None] * len(NAMES)
    return {name: None if value is None else float(value) for name, value in zip(NAMES, means, strict=True)} | {"positions": int(sums[0])}


def _correlation(count: float, sums: np.ndarray) -> float | None:
    """None where one of them is the same everywhere."""
    x, y, xx, yy, xy = sums / count
    spread = (xx - x * x) * (yy - y * y)
    return float((xy - x * y) / np.sqrt(spread)) if spread > 1e-18 else None
