"""Records to what the teacher says of them: render, forward, keep the strongest, write a shard, go on."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from pipeline.cache.reader import EXTRAS, read_prepared
from pipeline.cache.schema import FORMAT, Logits
from pipeline.cache.writer import Background, Shard, write_vocabulary
from pipeline.config import Data, Machine, Targets, Teacher
from pipeline.errors import NumericsError
from pipeline.files import appears_whole, write_json
from pipeline.models.heads import RowLogits, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.memory import PeakMemory
from pipeline.models.teacher import Question, Tail, said_of
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import Targets as Word
from pipeline.signals.vocabulary import CLASSES, first_byte_classes

TAIL_SHARDS = 16
"""Training shards, evenly spread, over which the tail marginals are summed up: enough for means, and little work."""


def run(data: Data, teacher: Teacher, targets: Targets, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    prepared = inputs["prepare-data"]
    source = inputs.model(teacher.model, teacher.revision)
    tokenizer = load_tokenizer(source, teacher.revision, data.template, teacher.model)
    vocabulary = tokenizer.vocabulary
    wanted = targets.logits
    counts = {split: prepared.summary[split] for split in ("train", "heldout")}
    splits = [split for split, count in counts.items() for _ in range(-(-count // data.records_per_shard))]
    with_tail = _spread(splits.count("train"), TAIL_SHARDS) if wanted.method == "head" else []
    out.plan("shards", len(splits))
    unfinished = set(out.unfinished(len(splits)))
    form = Logits.of(
        wanted.method,
        wanted.temperatures,
        wanted.step,
        wanted.threshold,
        wanted.least,
        wanted.keep,
        len(vocabulary),
        logsumexp=wanted.logsumexp,
        boundary=wanted.boundary,
    )

    head_file = out.path / "head.safetensors"
    if unfinished or (wanted.hidden and not head_file.exists()):
        device = device_named(machine.device)
        memory = PeakMemory(device)
        model = load_teacher(source, teacher.revision, teacher.quantization, teacher.double_quantization, teacher.dtype, device)
        head = row_logits(model, teacher.model, rows_that_are_tokens(model, teacher.model, vocabulary))
        if wanted.hidden:
            with appears_whole(head_file) as temporary:
                head.keep_head(temporary)
        question = Question(
            temperatures=wanted.temperatures,
            threshold=wanted.threshold,
            least=wanted.least,
            most=wanted.keep,
            draws=wanted.keep if wanted.method == "sampled" else 0,
            class_of=torch.from_numpy(first_byte_classes(vocabulary))[: head.vocabulary_size].to(device) if wanted.boundary else None,
            classes=len(CLASSES),
            hidden=wanted.hidden is not None,
        )
        numerics = {"device": str(device), "dtype": teacher.dtype, "batch_records": machine.teacher_batch_records, "threads": torch.get_num_threads()}
        progress = Progress("cache-teacher", total=len(splits), done=len(splits) - len(unfinished), unit="shards")
        records = {split: read_prepared(prepared.file(f"{split}.parquet")) for split in counts}
        started = time.monotonic()
        with Background() as writing:  # a shard is written while the teacher reads the next one
            for shard, split in enumerate(splits):
                here = list(islice(records[split], data.records_per_shard))
                if shard not in unfinished:
                    continue
                rendered = [fitted for record in here for fitted in _fitted(record, split, tokenizer, data.max_tokens)]
                kept = [example for example in rendered if example is not None]
                tail = Tail(wanted.temperatures, head.vocabulary_size, device) if shard in with_tail else None
                said = _said(head, [record for record, _ in kept], [tokens for _, tokens in kept], question, targets, machine, tail, writing.check)
                examples = [(record, tokens, word) for (record, tokens), word in zip(kept, said, strict=True)]
                written = Shard(out.path, shard, examples, form, targets.text == "keep", tail.log_means(len(vocabulary)) if tail else None)
                told = {"split": split, "left_out": len(rendered) - len(kept), "seconds": time.monotonic() - started, "peak_memory_mb": memory.megabytes(), "numerics": numerics}
                started = time.monotonic()  # what waits for the writer counts for the next shard
                writing.do(partial(_commit, out, written, told, progress))

    committed = [out.info(f"{shard:05d}") for shard in range(len(splits))]
    write_vocabulary(out.path / "vocabulary.parquet", vocabulary)
    with appears_whole(out.path / "tokenizer") as folder:
        tokenizer.tokenizer.save_pretrained(folder)
    about = {
        "format": FORMAT,
        "teacher": teacher.model,
        "template": data.template,
        "text": targets.text,
        "positions": targets.positions,
        "method": wanted.method,
        "temperatures": wanted.temperatures,
        "extras": ["entropy", *(extra for extra in EXTRAS if extra in ("logsumexp", "boundary", "hidden") and getattr(wanted, extra))],
        "vocabulary_size": len(vocabulary),
        "vocabulary": vocabulary.digest(),
        "rendering": tokenizer.digest(),
        "end_ids": list(vocabulary.end_ids),
        "tail_shards": with_tail,
        "specialties": _specialties(committed),
        "shards": [{key: shard[key] for key in ("split", "records", "tokens", "positions", "groups")} for shard in committed],
    }
    write_json(out.path / "cache.json", about)
    return _summary(committed)


def _fitted(record: Record, split: str, tokenizer: RecordTokenizer, max_tokens: int) -> Iterator[tuple[Record, Tokens] | None]:
    """The record, and if it is held out the record with each other option as its answer; None for what is too long."""
    fitted = tokenizer.fit(record, max_tokens)
    if fitted is None or split != "heldout" or not record.options:
        yield fitted
        return
    choices = [tokenizer.fit(choice, max_tokens) for choice in fitted[0].choices() if choice is not fitted[0]]
    if all(choices):
        yield from (fitted, *choices)
    else:  # without all its options it is no question that models can be compared on
        yield replace(fitted[0], options=None, answer_index=None), fitted[1]
        yield None


def _commit(out: RunFolder, written: Shard, told: dict[str, Any], progress: Progress) -> None:
    files = written.write()
    tokens = sum(len(tokens) for _, tokens, _ in written.examples)
    totals: dict[str, Any] = {"records": len(written.examples), "tokens": tokens, "positions": sum(len(word.position) for _, _, word in written.examples)}
    totals["specialties"] = dict(sorted(Counter(record.specialty or "" for record, _, _ in written.examples).items()))
    out.commit(f"{written.number:05d}", files, **told, **totals, groups=written.groups())
    progress.advance(1, tokens)


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, evenly spread."""
    return sorted({i * count // min(count, most) for i in range(min(count, most))})


def _said(head: RowLogits, records: list[Record], tokens: list[Tokens], question: Question, targets: Targets, machine: Machine, tail: Tail | None, check: Callable[[], None]) -> list[Word]:
    try:
        return said_of(head, tokens, question, everywhere=targets.positions == "all", batch_records=machine.teacher_batch_records, tail=tail, after_batch=check)
    except NumericsError as error:
        what, number, position = error.args
        raise NumericsError(
            f"The teacher's word on record {records[number].id}, position {position}, cannot be kept: {what} (NaN or infinity). "
            "The shards before it are kept. Try `--set teacher.dtype=float32`, or another quantization."
        ) from None


def _specialties(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Training records by specialty."""
    total: Counter[str] = Counter()
    for shard in shards:
        if shard["split"] == "train":
            total.update(shard["specialties"])
    return dict(total.most_common())


def _summary(shards: list[dict[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for shard in shards:
        total.update({key: shard[key] for key in ("records", "tokens", "positions", "left_out", "seconds")})
    return {
        "records": total["records"],
        "tokens": total["tokens"],
        "positions": total["positions"],
        "left_out": total["left_out"],
        "tokens_per_second": round(total["tokens"] / max(float(total["seconds"]), 1e-9), 1),
        "peak_memory_mb": round(max((shard["peak_memory_mb"] for shard in shards), default=0.0), 1),
        "mixed_numerics": len({str(shard["numerics"]) for shard in shards}) > 1,
    }
