import math
from typing import Any

from pipeline.benchmarks._records import row
from pipeline.benchmarks._scores import Scorer
from pipeline.signals.records import Record


def perplexity(model: Scorer, heldout: list[Record]) -> dict[str, Any]:
    """Bits per byte of the answers (comparable across tokenizers); perplexity and accuracy per token of the model's own."""
    scores = model.scores(heldout)
    if not scores:
        return {"bits_per_byte": None, "perplexity": None, "token_accuracy": None}
    logprob, tokens = sum(score.logprob for score in scores), sum(score.tokens for score in scores)
    followed = [None if score.certainty is None else int(score.certainty[:, 2].sum()) for score in scores]
    return {
        "bits_per_byte": -logprob / math.log(2) / sum(score.answer_bytes for score in scores),
        "perplexity": math.exp(-logprob / tokens),
        "token_accuracy": None if None in followed else sum(each or 0 for each in followed) / tokens,
        "records": [row(record, logprob=score.logprob, tokens=score.tokens, answer_bytes=score.answer_bytes, followed=each) for record, score, each in zip(heldout, scores, followed, strict=True)],
    }
