"""The teacher's answers to what benchmarks ask and its cache cannot answer: asked once, looked up by every evaluation."""

from typing import Any

from pipeline.benchmarks._records import KEPT, Row, refuse_twice
from pipeline.cache.reader import Cache
from pipeline.config import Asked, Machine, Teacher
from pipeline.errors import InputError, Mismatch
from pipeline.files import as_json, read_json
from pipeline.lookup import find
from pipeline.models.live import LiveModel
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.answers import Answers
from pipeline.running.fingerprint import alike
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs


def run(teacher: Teacher, asked: Asked, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    _refuse_another(read_json(out.path / "key.json")["sections"]["teacher"], inputs["cache-teacher"].identity["sections"]["teacher"])
    cache = Cache(inputs["cache-teacher"].file)
    heldout = [record for record in cache.records("heldout") if not record.choice_of]
    try:
        source = inputs.model(teacher.model, teacher.revision)
    except InputError as error:
        raise InputError(f"{error} Where it was asked already: --use evaluate-teacher=FOLDER. Without the teacher: `--set evaluation.ask_teacher=false`.") from None
    tokenizer = load_tokenizer(source, teacher.revision, cache.about["template"], teacher.model)
    model = load_teacher(source, teacher.revision, teacher.quantization, teacher.double_quantization, teacher.dtype, device_named(machine.device))
    answers = Answers(out, "teacher", Progress)
    live = LiveModel(model, tokenizer, teacher.model, machine.teacher_batch_records, answers)
    tasks: dict[str, Any] = {}
    kept: list[Row] = []
    for entry in asked.benchmarks:
        figures = find("benchmarks", entry.benchmark)(live, heldout, **entry.options())
        refuse_twice(kept, figures.get(KEPT, []))
        kept += figures.get(KEPT, [])
        tasks |= figures.get("tasks", {})
    with out.result("answers.json") as file:
        file.write_text(as_json(answers.known), encoding="utf-8")
    return {"answers": len(answers.known), "accuracy": {name: figures["accuracy"] for name, figures in tasks.items() if "accuracy" in figures}}


def _refuse_another(asked: Any, cached: Any) -> None:
    if not alike(asked, cached):
        raise Mismatch(
            "This experiment's teacher is not the one that the cache is of: another model, or the same with other settings. What was kept would be told of two teachers in one. "
            "Name that teacher in the YAML, or set evaluation.ask_teacher to false."
        )
