import math
from typing import Any

from pipeline.benchmarks._scores import Scorer
from pipeline.signals.records import Record


def perplexity(model: Scorer, heldout: list[Record]) -> dict[str, Any]:
    """Bits per byte of the answers (comparable across tokenizers), and perplexity per token of the model's own."""
    scores = model.scores(heldout)
    if not scores:
        return {"bits_per_byte": None, "perplexity": None}
    logprob = sum(score.logprob for score in scores)
    return {
        "bits_per_byte": -logprob / math.log(2) / sum(score.answer_bytes for score in scores),
        "perplexity": math.exp(-logprob / sum(score.tokens for score in scores)),
        "records": [(record, {"logprob": score.logprob, "tokens": score.tokens, "answer_bytes": score.answer_bytes}) for record, score in zip(heldout, scores, strict=True)],
    }
