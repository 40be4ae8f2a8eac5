from typing import Any

from pipeline.benchmarks._scores import Scorer
from pipeline.signals.records import Record


def fidelity(model: Scorer, heldout: list[Record]) -> dict[str, Any]:
    """KL(cached teacher || model) in nats and top-1 agreement, per position at which their tokens begin at the same byte."""
    scores = model.scores(heldout)
    aligned = sum(score.aligned for score in scores or [])
    if not scores or not aligned:
        return {"kl_to_teacher": None, "top1_agreement": None, "aligned_positions": 0}
    return {
        "kl_to_teacher": sum(score.kl for score in scores) / aligned,
        "top1_agreement": sum(score.agreeing for score in scores) / aligned,
        "aligned_positions": aligned,
        "records": [(record, {"kl": score.kl, "agreeing": score.agreeing, "aligned": score.aligned}) for record, score in zip(heldout, scores, strict=True)],
    }
