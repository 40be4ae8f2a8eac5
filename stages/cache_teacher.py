"""Records to what the teacher says of them: render, forward, keep the strongest, write a shard, go on."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.plan import planned_shards
from pipeline.cache.reader import EXTRAS, Cache, read_prepared
from pipeline.cache.schema import FORMAT, Logits
from pipeline.cache.writer import Background, Shard, write_vocabulary
from pipeline.config import Attention, Data, Machine, Targets, Teacher
from pipeline.config import Logits as LogitsSettings
from pipeline.errors import InputError, Mismatch, NumericsError, PipelineError
from pipeline.files import appears_whole, write_json
from pipeline.models.attention import Capture, sees_everything
from pipeline.models.cost import cost_of
from pipeline.models.heads import RowLogits, row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_teacher, numerics_of
from pipeline.models.memory import PeakMemory
from pipeline.models.teacher import Question, Tail, said_of
from pipeline.models.tokenizers import NotKept, RecordTokenizer, load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.contents import Contents
from pipeline.running.fingerprint import with_names
from pipeline.running.folder import FinishedFolder, RunFolder, left_behind
from pipeline.running.runner import Inputs
from pipeline.signals.attention import matched_layers
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import Targets as Word
from pipeline.signals.vocabulary import CLASSES, Vocabulary, first_byte_classes

Asked = tuple[Record, Tokens]
HEAD = "head"
HEAD_FILE = "head.safetensors"
"""A piece of its own."""
ABOUT = "about"
"""The piece that the last process to find all shards finished makes: what they have in common."""
COST = "cost"
"""A piece without files, that goes into the summary."""
SAME_WORD = 0.1
"""Nats by which the log-probability of what follows may be off on the average, when a teacher is asked again elsewhere."""
SAME_LOOK = 0.02
"""The same of the weight that a row's other keys have."""
NOT_KEPT = "the teacher's tokenizer does not keep its bytes (it normalises its text)"
"""Why a record is rejected."""


def run(data: Data, teacher: Teacher, targets: Targets, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    prepared = inputs["prepare-data"]
    source = inputs.model(teacher.model, teacher.revision)
    tokenizer = load_tokenizer(source, teacher.revision, data.template, teacher.model)
    vocabulary = tokenizer.vocabulary
    wanted = targets.logits
    shards = {shard.name: shard for shard in planned_shards(out.settings, prepared.file, with_tails=wanted.method == "head")}
    strict = machine.numerics == "strict"
    made = {} if strict else out.made_elsewhere()
    out.plan("shards", len(shards))
    form = _form(wanted, len(vocabulary))
    loaded = cache(partial(_loaded, source, teacher, targets, machine, vocabulary))
    records = prepared.summary["train"] + prepared.summary["heldout"]
    progress = Progress("cache-teacher", total=len(shards), done=len(shards.keys() & out.names()), unit="shards")

    same: set[str] = set()
    room_checked = False
    with Background() as writing:  # a shard is written while the teacher reads the next one
        started = time.monotonic()
        for name in out.pieces(list(shards), writing.check, {name: shard.key for name, shard in shards.items()}):
            shard = shards[name]
            if shard.key in made and out.take_over(name, *made[shard.key], shard.renamed):
                progress.advance(1, out.info(name)["tokens"])
                continue
            here = read_prepared(prepared.file(f"{shard.split}.parquet"), shard.group)
            rejected: list[dict[str, Any]] = []
            rendered = [fitted for record in here for fitted in _fitted(record, shard.split, tokenizer, data.max_tokens, rejected)]
            _check_rejected(_with_others(rejected, out, shards), machine.max_rejected, records)
            asked = [example for example in rendered if example is not None]
            word = loaded()
            if strict:
                there = shards.keys() & set(out.names())
                _refuse_mixed(out, there - same, word.numerics)
                same |= there
            room_checked = room_checked or _check_room(out, shards)
            while True:
                tail = Tail(wanted.temperatures, word.head.vocabulary_size, word.device) if shard.tail else None
                try:
                    said = word.of([tokens for _, tokens in asked], targets, tail, writing.check)
                    break
                except NumericsError as error:
                    asked = _without(asked, error, rejected)
                    _check_rejected(_with_others(rejected, out, shards), machine.max_rejected, records)
            examples = [(record, tokens, targets) for (record, tokens), targets in zip(asked, said, strict=True)]
            written = Shard(out.path, shard.number, examples, form, targets.text == "keep", tail.log_means(len(vocabulary)) if tail else None)
            told = {"key": shard.key, "split": shard.split, "attention": word.attention, "left_out": rendered.count(None), "rejected": rejected, "seconds": time.monotonic() - started}
            writing.do(partial(_commit, out, written, told | {"peak_memory_mb": word.memory.megabytes(), "numerics": word.numerics}, progress))
            started = time.monotonic()  # what waits for the writer counts for the next shard
    if wanted.hidden:
        for _ in out.pieces([HEAD], keys={HEAD: out.path.name}):
            with appears_whole(out.path / HEAD_FILE, absent=True) as temporary:
                loaded().head.keep_head(temporary)
            out.commit(HEAD, {HEAD_FILE: {}}, key=out.path.name)

    if machine.measure_cost and not out.sealed():
        for _ in out.pieces([COST]):
            out.commit(COST, {}, cost=cost_of(loaded().head.model, loaded().head.vocabulary_size))
    cost = out.info(COST)["cost"] if COST in out.names() else None

    committed = [out.info(name) for name in shards]
    if strict:
        _refuse_mixed(out, shards, committed[0]["numerics"])
    _check_rejected([each for shard in committed for each in shard["rejected"]], machine.max_rejected, records)
    if out.sealed():  # by another process
        return _summary(committed, teacher.model, cost)
    about = {
        "format": FORMAT,
        "template": data.template,
        "text": targets.text,
        "positions": targets.positions,
        "method": wanted.method,
        "temperatures": wanted.temperatures,
        "extras": ["entropy", *(extra for extra in EXTRAS if getattr(wanted, extra, None) or (extra == "attention" and targets.attention))],
        "attention": committed[0]["attention"],
        "vocabulary_size": len(vocabulary),
        "vocabulary": vocabulary.digest(),
        "rendering": tokenizer.digest(),
        "end_ids": list(vocabulary.end_ids),
        "tail_shards": [shard.number for shard in shards.values() if shard.tail],
        "specialties": _specialties(committed),
        "rejected": [each for shard in committed for each in shard["rejected"]],
        "shards": [{key: shard[key] for key in ("split", "records", "tokens", "positions", "groups", "numerics")} for shard in committed],
    }
    for _ in out.pieces([ABOUT], keys={ABOUT: out.path.name}):
        write_vocabulary(out.path / "vocabulary.parquet", vocabulary)
        with appears_whole(out.path / "tokenizer") as folder:
            tokenizer.tokenizer.save_pretrained(folder)
        write_json(out.path / "cache.json", about)
        files = ["cache.json", "vocabulary.parquet", *(f"tokenizer/{file.name}" for file in sorted((out.path / "tokenizer").iterdir()))]
        out.commit(ABOUT, {file: {} for file in files}, key=out.path.name)
    return _summary(committed, teacher.model, cost)


def _fitted(record: Record, split: str, tokenizer: RecordTokenizer, max_tokens: int, rejected: list[dict[str, Any]]) -> Iterator[tuple[Record, Tokens] | None]:
    """The record, and if it is held out the record with each other option as its answer; None for what is too long.

    Nothing, but for a word in `rejected`, for what the teacher's tokenizer does not keep to the byte.
    """
    try:
        fitted = tokenizer.fit(record, max_tokens)
        if fitted is None or split != "heldout" or not record.options:
            yield fitted
            return
        choices = [tokenizer.fit(choice, max_tokens) for choice in fitted[0].choices() if choice is not fitted[0]]
    except NotKept:
        rejected.append({"id": record.id, "reason": NOT_KEPT})
        return
    if all(choices):
        yield from (fitted, *choices)
    else:  # without all its options it is no question that models can be compared on
        yield replace(fitted[0], options=None, answer_index=None), fitted[1]
        yield None


@dataclass(frozen=True)
class _Loaded:
    """The teacher in memory, and what it is asked."""

    head: RowLogits
    question: Question
    capture: Capture | None
    memory: PeakMemory
    device: torch.device
    batch_records: int
    numerics: dict[str, Any]

    @property
    def attention(self) -> dict[str, Any] | None:
        """What is kept of it: the layers, of how many, and how many rows a position has."""
        if self.capture is None:
            return None
        text = self.head.model.config.get_text_config()
        return {"layers": self.capture.layers, "of": text.num_hidden_layers, "heads": text.num_attention_heads if self.capture.each_head else 1}

    def of(self, tokens: list[Tokens], targets: Targets, tail: Tail | None, check: Callable[[], None]) -> list[Word]:
        """NumericsError, with the record's number and the position in `.args[1:]`, if its logits are not finite."""
        for last in (False, True):
            try:
                return said_of(self.head, tokens, self.question, everywhere=targets.positions == "all", batch_records=self.batch_records, tail=tail, capture=self.capture, after_batch=check)
            except torch.OutOfMemoryError:
                if last:
                    raise InputError(
                        f"The device has not enough memory for {self.batch_records} records at once, twice in a row. Run the command again with a lower "
                        "`--set machine.teacher_batch_records=...`; what was finished is kept."
                    ) from None
                torch.cuda.empty_cache()
                if tail is not None:
                    tail.reset()
        raise AssertionError


def _loaded(source: str, teacher: Teacher, targets: Targets, machine: Machine, vocabulary: Vocabulary) -> _Loaded:
    wanted = targets.logits
    device = device_named(machine.device)
    memory = PeakMemory(device)
    model = load_teacher(source, teacher.revision, teacher.quantization, teacher.double_quantization, teacher.dtype, device)
    head = row_logits(model, teacher.model, rows_that_are_tokens(model, teacher.model, vocabulary))
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
    numerics = {**numerics_of(device), "dtype": teacher.dtype, "batch_records": machine.teacher_batch_records}
    return _Loaded(head, question, _capture(head, teacher.model, targets.attention), memory, device, machine.teacher_batch_records, numerics)


def _capture(head: RowLogits, name: str, wanted: Attention | None) -> Capture | None:
    if wanted is None:
        return None
    layers = wanted.layers or matched_layers(wanted.matched or 0, sees_everything(head.model))
    return Capture(head.model, name, layers, wanted.keys, wanted.heads == "each")


def _refuse_mixed(out: RunFolder, shards: Iterable[str], numerics: dict[str, Any]) -> None:
    for name in sorted(shards):
        theirs = out.info(name)["numerics"]
        if other := [f"{key} {theirs.get(key)} (here {value})" for key, value in numerics.items() if theirs.get(key) != value]:
            raise Mismatch(
                f"machine.numerics is strict, and shard {name} of {out.path} was made with {', '.join(other)}. Go on where, and as, it was made; "
                "or set machine.numerics to tolerant, and the manifest will say that the cache is mixed."
            )


def _check_room(out: RunFolder, shards: Iterable[str]) -> bool:
    """False as long as there is no shard to judge by."""
    names = set(shards)
    done = names & set(out.names())
    if done:
        size = sum(file.stat().st_size for name in done for file in out.path.glob(f"*-{name}.parquet"))
        needed, free = 1.1 * size / len(done) * (len(names) - len(done)), shutil.disk_usage(out.path).free
        if needed > free:
            raise PipelineError(
                f"The {len(names) - len(done)} shards that are missing need about {needed / 1e9:.3g} GB, and there are {free / 1e9:.3g} GB free where {out.path} lies. "
                "Free some space, or give another place with --runs; what was finished is kept."
            )
    return bool(done)


def _without(asked: list[Asked], error: NumericsError, rejected: list[dict[str, Any]]) -> list[Asked]:
    """The others; a question goes with all its options."""
    what, number, position = error.args
    wrong = asked[number][0]
    question = wrong.choice_of or wrong.id
    rejected.append({"id": question, "reason": f"{what} (NaN or infinity) at position {position} of {wrong.id}"})
    return [(record, tokens) for record, tokens in asked if (record.choice_of or record.id) != question]


def _with_others(rejected: list[dict[str, Any]], out: RunFolder, shards: Mapping[str, Any]) -> list[dict[str, Any]]:
    """And those of the shards that are done; they are looked up only if there are any here."""
    return rejected and rejected + [each for done in shards.keys() & set(out.names()) for each in out.info(done)["rejected"]]


def _check_rejected(rejected: list[dict[str, Any]], most: float, records: int) -> None:
    if len(rejected) > most * records:
        if rejected[0]["reason"] == NOT_KEPT:
            raise InputError(
                f"Record {rejected[0]['id']}: {NOT_KEPT}. With it {len(rejected)} of {records} records are rejected, more than machine.max_rejected ({most:g}) allows. "
                "Normalise the text in your data in the same way, leave such records out, or allow more."
            )
        raise NumericsError(
            f"The teacher's word on record {rejected[0]['id']} cannot be kept: {rejected[0]['reason']}. "
            f"With it {len(rejected)} of {records} records are rejected, more than machine.max_rejected ({most:g}) allows. "
            "The shards before it are kept. Try `--set teacher.dtype=float32`, or another quantization."
        )


def _commit(out: RunFolder, written: Shard, told: dict[str, Any], progress: Progress) -> None:
    name = f"{written.number:05d}"
    tokens = sum(len(tokens) for _, tokens, _ in written.examples)
    totals: dict[str, Any] = {"records": len(written.examples), "tokens": tokens, "positions": sum(len(word.position) for _, _, word in written.examples)}
    totals["specialties"] = dict(sorted(Counter(record.specialty or "" for record, _, _ in written.examples).items()))
    try:
        out.commit(name, written.write(), **told, **totals, groups=written.groups())
    except FileExistsError:  # another process was faster
        out.agree(name, written.digests())
    progress.advance(1, tokens)


def _specialties(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Training records by specialty."""
    total: Counter[str] = Counter()
    for shard in shards:
        if shard["split"] == "train":
            total.update(shard["specialties"])
    return dict(total.most_common())


def _summary(shards: list[dict[str, Any]], teacher: str, cost: dict[str, Any] | None) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for shard in shards:
        total.update({key: shard[key] for key in ("records", "tokens", "positions", "left_out", "seconds")})
    return {
        "teacher": teacher,
        "records": total["records"],
        "tokens": total["tokens"],
        "positions": total["positions"],
        "left_out": total["left_out"],
        "rejected": sum(len(shard["rejected"]) for shard in shards),
        "tokens_per_second": round(total["tokens"] / max(float(total["seconds"]), 1e-9), 1),
        "peak_memory_mb": round(max((shard["peak_memory_mb"] for shard in shards), default=0.0), 1),
        "cost": cost,
        "mixed_numerics": len({str(shard["numerics"]) for shard in shards}) > 1,
    }


def recomputed(folder: Path, count: int, runs: Path) -> dict[str, str]:
    """Ask the teacher again about some shards of a finished cache: logits file -> what is wrong, where it says something else.

    With the device, types, batch size and threads of then every bit must be the same; otherwise SAME_WORD nats are allowed.
    """
    finished = FinishedFolder(folder)
    looked = finished.names("attention-") and not left_behind(folder, finished.names())
    reader = Cache(finished.file, ("attention",) if looked else ())
    sections = with_names(finished.identity["sections"])
    teacher, targets = Teacher.model_validate(sections["teacher"]), Targets.model_validate(sections["targets"])
    machine = Machine.model_validate(finished.manifest["machine"]["settings"])
    content = Contents(runs).of_model(teacher.model, teacher.revision)
    if content != finished.identity["sections"]["teacher"]["model"]["content"]:
        raise InputError(f"The teacher at {teacher.model} is not the one that {folder} was made with, so it cannot be asked again. Put that one there.")
    vocabulary = reader.vocabulary()
    word = _loaded(Inputs({}, runs).model(teacher.model, teacher.revision), teacher, targets, machine, vocabulary)
    form = _form(targets.logits, len(vocabulary))
    wrong: dict[str, str] = {}
    for shard in np.random.default_rng(int(finished.root[-8:], 16)).permutation(len(reader.about["shards"]))[:count].tolist():
        name, looks = f"logits-{shard:05d}.parquet", f"attention-{shard:05d}.parquet"
        examples = list(reader.of_shard(shard))
        said = word.of([example.tokens for example in examples], targets, None, lambda: None)
        again = Shard(folder, shard, [(example.record, example.tokens, targets) for example, targets in zip(examples, said, strict=True)], form, True)
        digests, then = again.digests(), reader.about["shards"][shard].get("numerics")
        same = {file: digests[file] == {key: finished.manifest["files"][file].get(key) for key in ("rows", "rows_digest")} for file in (name, looks) if file in digests}
        if looked and not same.get(looks, True):
            rests = [np.concatenate([t.attention[layer].rest for t in word_of if t.attention]) for word_of in (said, [e.targets for e in examples]) for layer in reader.about["attention"]["layers"]]
            ours, theirs = np.split(np.stack(rests), 2)
            if then == word.numerics or not np.abs(ours - theirs).mean() <= SAME_LOOK:
                wrong[looks] = f"is not where the teacher looks now: the weight of what is not kept is off by {np.abs(ours - theirs).mean():.3g} on the average"
        if same[name]:
            continue
        off = np.concatenate([np.abs(example.targets.realised_logprob - targets.realised_logprob) for example, targets in zip(examples, said, strict=True)])
        if then == word.numerics or not off.mean() <= SAME_WORD:
            wrong[name] = f"is not what the teacher says now: what follows is off by {off.mean():.3g} nats on the average, {off.max():.3g} at most"
    return wrong


def _form(wanted: LogitsSettings, vocabulary_size: int) -> Logits:
    return Logits.of(
        wanted.method,
        wanted.temperatures,
        wanted.step,
        wanted.threshold,
        wanted.least,
        wanted.keep,
        vocabulary_size,
        logsumexp=wanted.logsumexp,
        boundary=wanted.boundary,
    )
