from typing import Any

import numpy as np

from pipeline.benchmarks._questions import Answered, figures_of, rows_of
from pipeline.benchmarks._records import DIGEST, HELDOUT
from pipeline.benchmarks._scores import Scorer
from pipeline.datasets._rows import record_of_row
from pipeline.lookup import find
from pipeline.options import Fields
from pipeline.signals.records import Record


def multiple_choice(model: Scorer, heldout: list[Record], *, path: str | None = None, fields: Fields | None = None) -> dict[str, Any]:
    """Accuracy of choosing the option with the highest log-likelihood per byte, with its 95 % interval (Wilson).

    An option's probability, of which the model's confidence is made: as if all options had their mean number of bytes.

    Over the held-out records that have options, or over those of a file (as the dataset jsonl reads it; the teacher, which
    is known from its cache of the held-out split alone, then has none), each question once.
    """
    records = heldout if path is None else [record_of_row(row, path, 1.0) for row in find("datasets", "jsonl")(path=path, fields=fields)]
    once = {(record.id if path is None else "", record.digest()): record for record in records if record.options and record.answer_index is not None}
    questions = list(once.values())
    choices = [choice for question in questions for choice in question.choices()]
    scores = model.scores(choices) if choices else None
    if not scores:
        return {"accuracy": None, "accuracy_interval": None, "questions": len(questions)}
    answered = []
    task = HELDOUT if path is None else "multiple_choice"
    begin = 0
    for question in questions:
        of_options = scores[begin : begin + len(question.options or ())]
        begin += len(of_options)
        sizes = np.array([max(score.answer_bytes, 1) for score in of_options])
        logprobs = np.array([score.logprob for score in of_options]) / sizes * sizes.mean()
        asked = "\n".join(segment.text for segment in question.segments[:-1])
        assert question.answer_index is not None
        answered.append(Answered(question.id, question.digest()[:DIGEST], question.specialty, asked, logprobs.tolist(), int(np.argmax(logprobs)), question.answer_index, task))
    figures = figures_of(answered)
    return {key: figures[key] for key in ("accuracy", "accuracy_interval", "questions")} | {"tasks": {"multiple_choice": figures}, "records": rows_of(answered)}
