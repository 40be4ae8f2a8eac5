from typing import Any

from pipeline.benchmarks._harness import Benchmark
from pipeline.benchmarks._local import Question
from pipeline.benchmarks._scores import Live
from pipeline.options import Commit, Count, Positive
from pipeline.signals.records import Record

OPTIONS = ("ending0", "ending1", "ending2", "ending3")


def _columns(question: Question) -> dict[str, Any]:
    return {"sent1": question.text, **dict(zip(OPTIONS, question.options, strict=True)), "label": question.answer, "specialty": question.specialty}


MEDQA = Benchmark(
    name="medqa",
    tasks={"medqa_4options": None},
    folder="medqa",
    split="test",
    examples="train",
    columns=_columns,
    about=lambda task, doc: (doc["sent1"], [doc[name] for name in OPTIONS], doc.get("specialty")),  # the hub has none
)


def medqa(live: Live, heldout: list[Record], *, path: str | None = None, revision: Commit | None = None, split: str | None = None, shots: Count = 0, limit: Positive | None = None) -> dict[str, Any]:
    """Accuracy on MedQA (Jin et al. 2021), questions of the United States' licensing examination, with four options. path: a local file instead of the hub."""
    return MEDQA.measure(live, path=path, revision=revision, split=split, shots=shots, limit=limit)
