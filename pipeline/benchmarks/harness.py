from typing import Annotated, Any

from pipeline.benchmarks._harness import measured
from pipeline.benchmarks._scores import Live
from pipeline.options import Count, Field, Positive
from pipeline.signals.records import Record


def harness(live: Live, heldout: list[Record], *, tasks: Annotated[list[str], Field(min_length=1)], shots: Count | None = None, limit: Positive | None = None) -> dict[str, Any]:
    """Accuracy on any multiple-choice tasks, groups or tags of lm-evaluation-harness, by its names, from the hub.

    shots: as many examples as each task says itself, if it is left out.
    """
    each = [measured(live, name, name, shots=shots, limit=limit) for name in dict.fromkeys(tasks)]
    return {"tasks": {name: figures for one in each for name, figures in one["tasks"].items()}, "records": [row for one in each for row in one.get("records", [])]}
