from typing import Any

import numpy as np

from pipeline.benchmarks._scores import Scorer
from pipeline.signals.records import Record


def calibration(model: Scorer, heldout: list[Record]) -> dict[str, Any]:
    """Whether the most likely token follows as often as its probability says, over all positions of the answers.

    The mean gap over 15 bins (ECE), the mean square of what the probability and 1 (it followed) or 0 differ by (Brier), and of
    each bin [positions, sum of the probabilities, how often the token followed].
    """
    found = [score.certainty for score in model.scores(heldout) or []]
    bins = [part for part in found if part is not None]
    if not bins or len(bins) < len(found):
        return {"calibration_error": None, "brier": None, "calibration": None}
    positions, probability, followed, squares = total = np.sum(bins, 0).T
    return {
        "calibration_error": float(np.abs(probability - followed).sum() / positions.sum()),
        "brier": float(squares.sum() / positions.sum()),
        "calibration": total[:3].T.tolist(),
    }
