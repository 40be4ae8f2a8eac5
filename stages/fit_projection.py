"""Two tokenizers and the cache to a projection: for each record, which student tokens the teacher's mass goes to."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.cache.projected import Fitted, read_counts, shares_file, write_counts, write_map, write_shares
from pipeline.cache.reader import Cache
from pipeline.config import Projection, TokenizerSource
from pipeline.errors import InputError
from pipeline.lookup import find, parameters
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.counts import counted
from pipeline.signals.projection import REST, meet
from pipeline.signals.records import Tokens
from pipeline.signals.targets import with_realised
from pipeline.signals.vocabulary import same_vocabulary

COUNTS, COUNTS_FILE = "counts", "counts.parquet"
MAP, MAP_FILE = "map", "projection.parquet"
COUNTED_POSITIONS = 2_000_000
"""Of the training answers, for methods that count: shard after shard in an order of their own, until there are so many."""


def run(student_tokenizer: TokenizerSource, projection: Projection, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    cache = Cache(inputs["cache-teacher"].file)
    teacher = cache.vocabulary()
    source = inputs.model(student_tokenizer.tokenizer, student_tokenizer.revision)
    student = load_tokenizer(source, student_tokenizer.revision, cache.about["template"], student_tokenizer.tokenizer)
    same = same_vocabulary(teacher, student.vocabulary)
    method = "identity" if same else projection.method
    if not same and cache.about["text"] != "keep":
        raise InputError(
            "This cache was made with `targets.text: omit`, so a student with another tokenizer cannot read its records. "
            "Choose a student with the teacher's tokenizer, or make the cache with `text: keep`."
        )
    asks_for = parameters("projections", method)[0]
    given = {"teacher": teacher, "student": student.vocabulary, "encode": student.encode}
    if "counts" in asks_for:
        for _ in out.pieces([COUNTS], keys={COUNTS: out.path.name}):
            said = write_counts(out.path / COUNTS_FILE, counted(_some(cache, student), len(teacher)))
            out.commit(COUNTS, {COUNTS_FILE: said}, key=out.path.name)
        given["counts"] = read_counts(out.path / COUNTS_FILE, len(teacher))
    options = {} if same else {key: value for key, value in projection.options().items() if key != "method"}
    fitted = find("projections", method)(*(given[name] for name in asks_for), **options)
    for _ in out.pieces([MAP], keys={MAP: out.path.name}):
        said = write_map(out.path / MAP_FILE, Fitted(method, cache.about["vocabulary"], student.digest(), fitted.names_tokens, fitted.student_id))
        out.commit(MAP, {MAP_FILE: said}, key=out.path.name)

    summary = {"method": method, "teacher_tokens": len(teacher), "student_tokens": len(student.vocabulary), "teacher_tokens_placed": int(np.count_nonzero(fitted.student_id != REST))}
    if method == "identity":
        return summary
    names = [f"{shard:05d}" for shard in range(len(cache.about["shards"]))]
    out.plan("shards", len(names))
    progress = Progress("fit-projection", total=len(names), done=len(set(names) & set(out.names())), unit="shards")
    for name in out.pieces(names, keys=dict.fromkeys(names, out.path.name)):
        found, first, wanted = [], [], 0
        examples = list(cache.of_shard(int(name)))
        for example in examples:
            tokens = student.render(example.record)
            targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
            meeting = meet(example.record.content, example.tokens, targets, tokens)
            found.append(fitted.shares(meeting))
            first.append(meeting.first)
            wanted += len(tokens.answer_positions())
        said = write_shares(out.path / shares_file(int(name)), [example.record.id for example in examples], found, first, cache.about["shards"][int(name)]["groups"])
        told = [shares.placed() for shares in found]
        placed, inside = sum(int(there.sum()) for there in told), sum(int((there & shares.inside).sum()) for there, shares in zip(told, found, strict=True))
        out.commit(name, {shares_file(int(name)): said}, key=out.path.name, student_positions=wanted, placed_positions=placed, inside=inside)
        progress.advance(1, wanted)
    shards = [out.info(name) for name in names]
    total = {key: sum(shard[key] for shard in shards) for key in ("student_positions", "placed_positions", "inside")}
    return summary | total | {"coverage": round(total["placed_positions"] / max(total["student_positions"], 1), 4)}


def _some(cache: Cache, student: RecordTokenizer) -> Iterator[tuple[Tokens, Tokens]]:
    """The teacher's and the student's tokens of training records."""
    count = 0
    for shard in sorted(cache.shards("train"), key=lambda shard: hashlib.sha256(str(shard).encode()).digest()):
        for example in cache.of_shard(shard):
            yield example.tokens, student.render(example.record)
            count += len(example.targets.position)
        if count >= COUNTED_POSITIONS:
            return
