"""Small caches with made-up words of a teacher, written by the real writer, and nothing of a model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.schema import FORMAT, Logits
from pipeline.cache.writer import Shard, write_vocabulary
from pipeline.signals.records import ANSWER, CONTENT, END, TEMPLATE, Record, Segment, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import CLASSES, Vocabulary
from tests.signals.dense import log_softmax, log_sum, targets_of
from tests.signals.test_attention import some_rows

SIZE = 90
HIDDEN = 6
TEMPERATURES = [1.0, 2.0, 8.0]
VOCABULARY = Vocabulary([b"", *(f"{n}".encode() for n in range(1, SIZE - 1)), b""], np.array([True, *[False] * (SIZE - 2), True]), end_ids=(SIZE - 1,))
DRAWS = 20

Examples = list[tuple[Record, Tokens, Targets]]


def form(**more) -> Logits:
    method = more.pop("method", "head")
    return Logits.of(method, more.pop("temperatures", TEMPERATURES), (0.02, 0.5), 0.02, 2, DRAWS if method == "sampled" else 12, SIZE, **more)


def example(number: int, split: str = "train", turns: int | None = None, form: Logits | None = None, hidden: bool = False, heads: int = 0) -> tuple[Record, Tokens, Targets]:
    """A record of several turns, so that its answers' positions are several spans; what is said of it is nasty here and there."""
    form = form or globals()["form"]()
    rng = np.random.default_rng(number)
    segments, kind, spans = [], [TEMPLATE], [(0, 0)]
    at = 0
    for _ in range(turns if turns is not None else int(rng.integers(1, 4))):
        for role, of in (("user", CONTENT), ("assistant", ANSWER)):
            length = int(rng.integers(0 if of == ANSWER else 1, 6))
            segments.append(Segment(role, "x" * length))
            kind += [of] * length + [END] * (of == ANSWER)
            spans += [(at + n, at + n + 1) for n in range(length)] + [(at + length, at + length)] * (of == ANSWER)
            at += length
    record = Record(f"r{number}", tuple(segments), source="made", specialty=["heart", "eye", None][number % 3], split=split, weight=1.0 + number % 2)
    if number % 4 == 0:
        record = replace(record, options=("a", "b"), answer_index=1)
    start, end = np.array(spans, np.int32).T
    tokens = Tokens(rng.integers(1, SIZE - 1, len(kind)).astype(np.int32), start, end, np.array(kind, np.uint8), rng.integers(0, 2**40, len(kind)))
    targets = said(tokens, rng, form, hidden)
    attention = {layer: some_rows(targets.position, heads, number + layer) for layer in (2, 5)} if heads else None
    return record, tokens, replace(targets, attention=attention)


def said(tokens: Tokens, rng: np.random.Generator, form: Logits, hidden: bool) -> Targets:
    position = tokens.answer_positions()
    logits = rng.normal(0, 2, (len(position), SIZE))
    logits[1::5] = 0
    logits[2::5] = np.where(np.arange(SIZE) == 7, 70.0, 0.0)
    logits[3::5, 10:] = -69
    targets = targets_of(logits, tokens, position, 12, form.temperatures, threshold=0.02, least=2)
    logprobs = log_softmax(logits)
    if form.method == "sampled":
        rows = [np.unique(rng.choice(SIZE, DRAWS, p=np.exp(row)), return_counts=True) for row in logprobs]
        flat = np.concatenate([ids for ids, _ in rows])
        owner = np.repeat(np.arange(len(rows)), [len(ids) for ids, _ in rows])
        targets = replace(
            targets,
            kept=np.array([len(ids) for ids, _ in rows], np.uint16),
            ids=flat.astype(np.int32),
            logprobs=logprobs[owner, flat].astype(np.float32),
            counts=np.concatenate([counts for _, counts in rows]).astype(np.uint8),
            rests=np.full_like(targets.rests, -np.inf),
        )
    class_of = np.arange(SIZE) % len(CLASSES)
    return replace(
        targets,
        logsumexp=np.array([log_sum(row) for row in logits], np.float32),
        boundary=np.array([[log_sum(row[class_of == i]) for i in range(len(CLASSES))] for row in logprobs], np.float32),
        hidden=rng.integers(-127, 128, (len(position), HIDDEN)).astype(np.int8) if hidden else None,
        hidden_scale=rng.random(len(position)).astype(np.float32) if hidden else None,
    )


def write(folder: Path, shards: list[Examples], form: Logits, keep_text: bool = True, tails: list[tuple[np.ndarray, int] | None] | None = None, **about) -> Path:
    """A cache's folder: what cache-teacher leaves there, but for the manifest."""
    tails = tails or [None] * len(shards)
    written = [Shard(folder, number, examples, form, keep_text, tail) for number, (examples, tail) in enumerate(zip(shards, tails, strict=True))]
    for shard in written:
        shard.write()
    write_vocabulary(folder / "vocabulary.parquet", VOCABULARY)
    hidden = any(targets.hidden is not None for examples in shards for _, _, targets in examples)
    said = {
        "format": FORMAT,
        "text": "keep" if keep_text else "omit",
        "temperatures": form.temperatures,
        "attention": {"layers": [2, 5]},
        "extras": ["entropy", "attention", *(["logsumexp"] if form.logsumexp else []), *(["boundary"] if form.boundary else []), *(["hidden"] if hidden else [])],
        "vocabulary_size": SIZE,
        "vocabulary": VOCABULARY.digest(),
        "end_ids": list(VOCABULARY.end_ids),
        "tail_shards": [number for number, tail in enumerate(tails) if tail is not None],
        "shards": [{"split": examples[0][0].split if examples else "train", "records": len(examples), "groups": shard.groups()} for examples, shard in zip(shards, written, strict=True)],
    }
    (folder / "cache.json").write_text(json.dumps(said | about))
    return folder


def opened(folder: Path, *extras: str) -> Cache:
    return Cache(lambda name: folder / name, extras)
