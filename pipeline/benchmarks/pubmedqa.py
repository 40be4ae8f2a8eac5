from typing import Any

from pipeline.benchmarks._harness import Benchmark
from pipeline.benchmarks._local import Question
from pipeline.benchmarks._scores import Live
from pipeline.options import Commit, Count, Positive
from pipeline.signals.records import Record

OPTIONS = ("yes", "no", "maybe")


def _columns(question: Question) -> dict[str, Any]:
    return {"QUESTION": question.text, "CONTEXTS": question.context, "final_decision": question.options[question.answer], "specialty": question.specialty}


PUBMEDQA = Benchmark(
    name="pubmedqa",
    tasks={"pubmedqa": None},
    folder="pubmedqa",
    split="test",
    examples="train",
    columns=_columns,
    about=lambda task, doc: ("\n".join([*doc["CONTEXTS"], doc["QUESTION"]]), OPTIONS, doc.get("specialty")),  # the hub has none
    options=OPTIONS,
    context=True,
)


def pubmedqa(
    live: Live, heldout: list[Record], *, path: str | None = None, revision: Commit | None = None, split: str | None = None, shots: Count = 0, limit: Positive | None = None
) -> dict[str, Any]:
    """Accuracy on PubMedQA (Jin et al. 2019): whether an abstract answers a question with yes, no or maybe. path: a local file instead of the hub.

    The hub's copy is a loading script, which datasets 4 and later do not run: with these, only a local file will do.
    """
    return PUBMEDQA.measure(live, path=path, revision=revision, split=split, shots=shots, limit=limit)
