"""Records to what the teacher says of them: render, forward, keep the strongest, write a shard, go on."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from pipeline.cache.reader import read_prepared
from pipeline.cache.schema import FORMAT
from pipeline.cache.writer import write_shard, write_vocabulary
from pipeline.config import Data, Machine, Targets, Teacher
from pipeline.errors import NumericsError
from pipeline.files import appears_whole, write_json
from pipeline.models.heads import RowLogits, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_teacher
from pipeline.models.memory import PeakMemory
from pipeline.models.teacher import said_of
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.codec import LOGPROB_ERROR
from pipeline.signals.records import Record, Tokens


def run(data: Data, teacher: Teacher, targets: Targets, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    prepared = inputs["prepare-data"]
    source = inputs.model(teacher.model, teacher.revision)
    tokenizer = load_tokenizer(source, teacher.revision, data.template, teacher.model)
    counts = {split: prepared.summary[split] for split in ("train", "heldout")}
    splits = [split for split, count in counts.items() for _ in range(-(-count // data.records_per_shard))]
    out.plan("shards", len(splits))
    unfinished = set(out.unfinished(len(splits)))

    if unfinished:
        device = device_named(machine.device)
        memory = PeakMemory(device)
        model = load_teacher(source, teacher.revision, teacher.quantization, teacher.double_quantization, teacher.dtype, device)
        head = row_logits(model, teacher.model, rows_that_are_tokens(model, teacher.model, tokenizer.vocabulary))
        numerics = {"device": str(device), "dtype": teacher.dtype, "batch_records": machine.teacher_batch_records, "threads": torch.get_num_threads()}
        progress = Progress("cache-teacher", total=len(splits), done=len(splits) - len(unfinished), unit="shards")
        records = {split: read_prepared(prepared.file(f"{split}.parquet")) for split in counts}
        for shard, split in enumerate(splits):
            here = list(islice(records[split], data.records_per_shard))
            if shard not in unfinished:
                continue
            rendered = [fitted for record in here for fitted in _fitted(record, split, tokenizer, data.max_tokens)]
            kept = [example for example in rendered if example is not None]
            left_out = len(rendered) - len(kept)
            started = time.monotonic()
            said = _said(head, [record for record, _ in kept], [tokens for _, tokens in kept], targets, machine)
            seconds = time.monotonic() - started
            examples = [(record, tokens, word) for (record, tokens), word in zip(kept, said, strict=True)]
            files = write_shard(out.path, shard, examples, targets.logits.temperatures, keep_text=targets.text == "keep")
            tokens = sum(len(tokens) for _, tokens in kept)
            totals: dict[str, Any] = {"split": split, "records": len(kept), "tokens": tokens, "positions": sum(len(word.position) for word in said), "left_out": left_out}
            totals["specialties"] = dict(sorted(Counter(record.specialty or "" for record, _ in kept).items()))
            out.commit(f"{shard:05d}", files, **totals, seconds=seconds, peak_memory_mb=memory.megabytes(), numerics=numerics)
            progress.advance(1, tokens)

    committed = [out.info(f"{shard:05d}") for shard in range(len(splits))]
    write_vocabulary(out.path / "vocabulary.parquet", tokenizer.vocabulary)
    with appears_whole(out.path / "tokenizer") as folder:
        tokenizer.tokenizer.save_pretrained(folder)
    about = {
        "format": FORMAT,
        "teacher": teacher.model,
        "template": data.template,
        "text": targets.text,
        "positions": targets.positions,
        "temperatures": targets.logits.temperatures,
        "logprob_error": LOGPROB_ERROR,
        "vocabulary_size": len(tokenizer.vocabulary),
        "vocabulary": tokenizer.vocabulary.digest(),
        "end_ids": list(tokenizer.vocabulary.end_ids),
        "specialties": _specialties(committed),
        "shards": [{key: shard[key] for key in ("split", "records", "tokens", "positions")} for shard in committed],
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


def _said(head: RowLogits, records: list[Record], tokens: list[Tokens], targets: Targets, machine: Machine) -> list[Any]:
    try:
        return said_of(
            head,
            tokens,
            everywhere=targets.positions == "all",
            keep=targets.logits.keep,
            temperatures=targets.logits.temperatures,
            batch_records=machine.teacher_batch_records,
        )
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
