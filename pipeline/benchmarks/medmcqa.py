from typing import Any

from pipeline.benchmarks._harness import Benchmark
from pipeline.benchmarks._local import Question
from pipeline.benchmarks._scores import Live
from pipeline.options import Commit, Count, Positive
from pipeline.signals.records import Record

OPTIONS = ("opa", "opb", "opc", "opd")


def _columns(question: Question) -> dict[str, Any]:
    return {"question": question.text, **dict(zip(OPTIONS, question.options, strict=True)), "cop": question.answer, "subject_name": question.specialty}


MEDMCQA = Benchmark(
    name="medmcqa",
    tasks={"medmcqa": None},
    folder="medmcqa",
    split="validation",  # the answers of its test split were never published
    examples="train",
    columns=_columns,
    about=lambda task, doc: (doc["question"], [doc[name] for name in OPTIONS], doc["subject_name"]),
)


def medmcqa(live: Live, heldout: list[Record], *, path: str | None = None, revision: Commit | None = None, split: str | None = None, shots: Count = 0, limit: Positive | None = None) -> dict[str, Any]:
    """Accuracy on MedMCQA (Pal et al. 2022), questions of Indian entrance examinations. path: a local file instead of the hub."""
    return MEDMCQA.measure(live, path=path, revision=revision, split=split, shots=shots, limit=limit)
