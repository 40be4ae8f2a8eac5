"""Two tokenizers and the cache to a projection, and what it is worth before any training."""

from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.reader import Cache
from pipeline.config import Projection, TokenizerSource
from pipeline.lookup import find
from pipeline.models.tokenizers import load_tokenizer
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.projection import at_temperature, project
from pipeline.signals.vocabulary import same_vocabulary

SAMPLE = 500
"""Records of the cache on which the projection is measured."""


def run(student_tokenizer: TokenizerSource, projection: Projection, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    cache = Cache(inputs["cache-teacher"].file)
    teacher = cache.vocabulary()
    source = inputs.model(student_tokenizer.tokenizer, student_tokenizer.revision)
    student = load_tokenizer(source, student_tokenizer.revision, cache.about["template"], student_tokenizer.tokenizer)

    same = same_vocabulary(teacher, student.vocabulary)
    method = "identity" if same else projection.method
    options = {} if same else {key: value for key, value in projection.options().items() if key != "method"}
    fitted = find("projections", method)(teacher, student.vocabulary, student.encode, **options)
    about = {"method": method, "realised_path": str(fitted.realised_path), "vocabulary": cache.about["vocabulary"]}
    table = pa.table({"student_id": pa.array(fitted.student_id, pa.int32())}).replace_schema_metadata(about)
    with out.result("projection.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    measured = {"student_positions": 0, "aligned": 0, "placed": 0.0}
    for example in islice(cache.examples("train"), SAMPLE):
        tokens = student.render(example.record) if example.has_text else example.tokens
        projected = project(fitted, example.targets, cache.temperatures, len(teacher), example.tokens, tokens)
        measured["student_positions"] += len(tokens.answer_positions())
        measured["aligned"] += len(projected.position)
        if len(projected.position):
            measured["placed"] += float(at_temperature([projected], cache.temperatures, 1.0).probs.sum())
    return {
        "method": method,
        "teacher_tokens": len(teacher),
        "student_tokens": len(student.vocabulary),
        "teacher_tokens_placed": int(np.count_nonzero(fitted.student_id >= 0)),
        "coverage": round(measured["aligned"] / max(measured["student_positions"], 1), 4),
        "placed_mass": round(measured["placed"] / max(measured["aligned"], 1), 4),
    }
