from typing import Any

from pipeline.benchmarks._harness import Benchmark
from pipeline.benchmarks._scores import Live
from pipeline.options import Commit, Count, Positive
from pipeline.signals.records import Record

SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "nutrition", "professional_medicine", "virology")
MMLU = Benchmark(
    name="mmlu_medical",
    tasks={f"mmlu_{subject}": subject for subject in SUBJECTS},
    folder="mmlu/default",
    split="test",
    examples="dev",
    columns=lambda question: {"question": question.text, "subject": question.specialty, "choices": question.options, "answer": question.answer},
    about=lambda task, doc: (doc["question"], doc["choices"], doc["subject"]),
)


def mmlu_medical(
    live: Live, heldout: list[Record], *, path: str | None = None, revision: Commit | None = None, split: str | None = None, shots: Count = 0, limit: Positive | None = None
) -> dict[str, Any]:
    """Accuracy on the eight medical subjects of MMLU (Hendrycks et al. 2021), over all questions and as the mean of the subjects.

    path: a local file instead of the hub, where a question's subject is its specialty; those of other subjects are left out.
    """
    return MMLU.measure(live, path=path, revision=revision, split=split, shots=shots, limit=limit)
