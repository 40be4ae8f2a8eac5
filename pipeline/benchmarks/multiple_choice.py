from typing import Any

import numpy as np

from pipeline.benchmarks._bootstrap import interval, resampled
from pipeline.benchmarks._scores import Scorer
from pipeline.datasets._rows import record_of_row
from pipeline.lookup import find
from pipeline.options import Fields
from pipeline.signals.records import Record


def multiple_choice(model: Scorer, heldout: list[Record], *, path: str | None = None, fields: Fields | None = None) -> dict[str, Any]:
    """Accuracy of choosing the option with the highest log-likelihood per byte, with a 95 % bootstrap interval.

    Over the held-out records that have options, or over those of a file (as the dataset jsonl reads it; the teacher, which
    is known from its cache of the held-out split alone, then has none).
    """
    records = heldout if path is None else [record_of_row(row, path, 1.0) for row in find("datasets", "jsonl")(path=path, fields=fields)]
    questions = [record for record in records if record.options and record.answer_index is not None]
    choices = [choice for question in questions for choice in question.choices()]
    scores = model.scores(choices) if choices else None
    if not scores:
        return {"accuracy": None, "accuracy_interval": None, "questions": len(questions)}
    chosen = []
    begin = 0
    for question in questions:
        count = len(question.options or ())
        per_byte = [score.logprob / max(score.answer_bytes, 1) for score in scores[begin : begin + count]]
        chosen.append(int(np.argmax(per_byte)))
        begin += count
    right = np.array([choice == question.answer_index for choice, question in zip(chosen, questions, strict=True)])
    found = interval(resampled(right[:, None], np.ones((len(right), 1)))[:, 0])
    assert found
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": list(found),
        "questions": len(questions),
        "records": [(question, {"chosen": choice, "answer": question.answer_index, "right": choice == question.answer_index}) for question, choice in zip(questions, chosen, strict=True)],
    }
