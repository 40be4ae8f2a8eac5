"""Where the teacher looks in one record: its strongest keys as text, and beside a student's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.reader import Cache, Example
from pipeline.errors import InputError
from pipeline.models.attention import Capture
from pipeline.models.loading import load_student
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.inspection import find
from pipeline.running.folder import FinishedFolder
from pipeline.signals.attention import Matched, Rows, heads_of, matched, proportional
from pipeline.signals.ragged import runs
from pipeline.signals.records import Tokens


def row(folder: Path, id: str, layer: int, query: int) -> dict[str, Any]:
    """The strongest keys of one row; where heads were kept apart, of each head. query: the position, as `inspect --record` counts."""
    cache, example = find(folder, id, ("attention",))
    rows = _rows(cache, example, layer)
    described = example.targets.position
    at = int(np.searchsorted(described, query))
    if at == len(described) or described[at] != query:
        raise InputError(
            f"Position {query} of record {id} has no row: there are {described[0]} to {described[-1]}, those that describe a token of the answer." if len(described) else f"Record {id} has no rows."
        )
    token_bytes = cache.vocabulary().token_bytes
    heads = heads_of(rows, described)
    kept = rows.kept.astype(np.int64)
    found = []
    for head in range(heads):
        number = at * heads + head
        _, here = runs((np.cumsum(kept) - kept)[number : number + 1], kept[number : number + 1])
        order = here[np.argsort(-rows.weight[here], kind="stable")]
        keys = [{"position": int(rows.key[i]), "text": _text(token_bytes, example.tokens, int(rows.key[i])), "weight": round(float(rows.weight[i]), 5)} for i in order]
        found.append({"keys": keys, "rest": round(float(rows.rest[number]), 5)})
    return {"id": id, "layer": layer, "query": query, "text": _text(token_bytes, example.tokens, query), "next": _text(token_bytes, example.tokens, query + 1), "heads": found}


def as_text(shown: dict[str, Any]) -> str:
    lines = [f"{shown['id']}, layer {shown['layer']}: at {shown['text']} ({shown['query']}), before {shown['next']}"]
    for number, head in enumerate(shown["heads"]):
        if len(shown["heads"]) > 1:
            lines.append(f"head {number}")
        lines += [f"{key['position']:>6} {key['weight']:7.1%} {'█' * round(40 * key['weight'])} {key['text']}" for key in head["keys"]]
        lines.append(f"others {head['rest']:7.1%}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Side:
    """Whose weights, row by row, over its tokens."""

    title: str
    weights: np.ndarray  # float32 [rows, tokens]
    tokens: list[str]
    queries: list[str]


def sides(folder: Path, id: str, layer: int, student: Path | None) -> list[Side]:
    """The teacher's rows, the mean of its heads; and a student's at the same bytes, at the layer that was compared, or is at the same depth.

    Where there is a student the teacher's weights are shown on its tokens: a cell's is shared out evenly among the cell's.
    """
    cache, example = find(folder, id, ("attention",))
    rows, described = _rows(cache, example, layer), example.targets.position
    names = cache.vocabulary().token_bytes
    teacher = str(FinishedFolder(folder).summary["teacher"])
    if student is None:
        alone = matched(rows, described, example.tokens, example.tokens, 1)
        tokens, name = example.tokens, [_text(names, example.tokens, i) for i in range(len(example.tokens))]
        return [Side(f"{teacher}, layer {layer}", _dense(alone, len(tokens)), name, [name[i] for i in alone.position])]
    run = FinishedFolder(student)
    if run.manifest["stage"] not in ("train-student", "train-control"):
        raise InputError(f"{student} is a folder of {run.manifest['stage']}, not a student. Give the folder of a finished train-student.")
    source = str(student / "student")
    tokenizer = load_tokenizer(source, None, cache.about["template"], source)
    alike = tokenizer.digest() == cache.about["rendering"]
    if not alike and not example.has_text:
        raise InputError("This cache was made with `targets.text: omit`, so a student with another tokenizer cannot read its records.")
    tokens = example.tokens if alike else tokenizer.render(example.record)
    model = load_student(source, None, None, torch.device("cpu")).eval()
    ours = _students_layer(run, layer, cache.about["attention"]["of"], model.config.get_text_config().num_hidden_layers)
    found = matched(rows, described, example.tokens, tokens, 1)
    capture = Capture(model, source, [ours], len(tokens), each_head=False)
    capture.rows(found.position.astype(np.int64))
    with torch.inference_mode():
        model.base_model(input_ids=torch.from_numpy(tokens.ids.astype(np.int64))[None], use_cache=False)
    theirs = capture.taken()[ours]
    dense = np.zeros((len(found.position), len(tokens)), dtype=np.float32)
    dense[np.repeat(np.arange(len(theirs.kept)), theirs.kept), theirs.key] = theirs.weight
    name = [_text(tokenizer.vocabulary.token_bytes, tokens, i) for i in range(len(tokens))]
    queries = [name[i] for i in found.position]
    return [Side(f"{teacher}, layer {layer}", _dense(found, len(tokens)), name, queries), Side(f"{run.path.name}, layer {ours}", dense, name, queries)]


def _rows(cache: Cache, example: Example, layer: int) -> Rows:
    rows = (example.targets.attention or {}).get(layer)
    if rows is None:
        raise InputError(f"This cache has the attention of the layers {cache.about['attention']['layers']}, and not of {layer}. Name one of these.")
    return rows


def _students_layer(run: FinishedFolder, layer: int, of: int, students: int) -> int:
    for part in run.identity["sections"]["training"]["objective"]:
        for theirs, ours in part.get("layers") or []:
            if theirs == layer:
                return int(ours)
    return proportional(layer, of, students)


def _dense(found: Matched, width: int) -> np.ndarray:
    """float32 [rows, width]: each cell's weight shared out evenly among its tokens."""
    cell_row = np.repeat(np.arange(len(found.cells)), found.cells)
    cell = np.repeat(np.arange(len(found.keys)), found.keys)
    dense = np.zeros((len(found.position), width), dtype=np.float32)
    dense[cell_row[cell], found.key] = (found.weight / np.maximum(found.keys, 1))[cell]
    return dense


def _text(token_bytes: list[bytes], tokens: Tokens, index: int) -> str:
    token = int(tokens.ids[index])
    return repr(token_bytes[token].decode(errors="backslashreplace")) if token_bytes[token] else f"<{token}>"
