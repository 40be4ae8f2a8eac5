"""Two tokenizers and the cache to a projection: for each record, which student tokens the teacher's mass goes to."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.cache.projected import Fitted, read_counts, shares_file, values_file, write_counts, write_map, write_shares, write_values
from pipeline.cache.reader import Cache, Example
from pipeline.config import Projection, TokenizerSource
from pipeline.errors import InputError
from pipeline.files import appears_whole, sha256_of
from pipeline.lookup import find, parameters
from pipeline.models.tokenizers import NotKept, RecordTokenizer, load_tokenizer
from pipeline.reporting.progress import Progress
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.counts import counted
from pipeline.signals.fitting import Layer, Places, fit
from pipeline.signals.projection import REST, Meeting, meet, no_shares, no_values
from pipeline.signals.records import Tokens
from pipeline.signals.targets import with_realised
from pipeline.signals.vocabulary import same_vocabulary

COUNTS, COUNTS_FILE = "counts", "counts.parquet"
WEIGHTS, WEIGHTS_FILE = "weights", "projection-weights.safetensors"
MAP, MAP_FILE = "map", "projection.parquet"
COUNTED_POSITIONS = 2_000_000
"""Of the training answers, for methods that count: shard after shard in an order of their own, until there are so many."""
TRAINED_POSITIONS = 200_000
"""The same for methods that are trained."""
HELD_OUT = 10
"""One in so many of these records is neither counted nor trained on but tells when to stop."""


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
    names = [] if method == "identity" else [f"{shard:05d}" for shard in range(len(cache.about["shards"]))]
    out.plan("shards", len(names))
    asks_for = parameters("projections", method)[0]
    given: dict[str, Any] = {"teacher": teacher, "student": student.vocabulary, "encode": student.encode}
    if "counts" in asks_for:
        for _ in out.pieces([COUNTS], keys={COUNTS: out.path.name}):
            said = write_counts(
                out.path / COUNTS_FILE,
                counted(_pairs(cache, student, held_out=False if "trained" in asks_for else None), len(teacher)),
            )
            out.commit(COUNTS, {COUNTS_FILE: said}, key=out.path.name)
        given["counts"] = read_counts(out.path / COUNTS_FILE, len(teacher))

    def trained(layer: Layer, **how: Any) -> None:
        """Train, or take what was trained before."""
        for _ in out.pieces([WEIGHTS], keys={WEIGHTS: out.path.name}):
            done = [name for name in out.committed() if name.startswith("epoch-") and _is_of_this_run(out, name)]
            progress = Progress("fit-projection", total=how["epochs"], done=int(done[-1].removeprefix("epoch-")) if done else 0, unit="epochs at most")
            places, held_out = (_places(cache, student, held_out=which) for which in (False, True))

            def after_epoch(epoch: int, state: dict[str, Tensor], progress: Progress = progress, count: int = len(places.kept)) -> None:
                """So that a run that is killed goes on from here."""
                name = f"epoch-{epoch:04d}"
                with appears_whole(_checkpoint(out, name)) as temporary:
                    save_file(state, temporary)
                out.commit(name, {_checkpoint(out, name).relative_to(out.path).as_posix(): {}}, run=out.path.name)
                for old in out.names():
                    if old.startswith("epoch-") and old < name:
                        out.withdraw(old)
                progress.advance(1, count)

            begun = load_file(_checkpoint(out, done[-1])) if done else None
            found = fit(layer, places, held_out, begun=begun, after_epoch=after_epoch, **how)
            progress.finish()
            with appears_whole(out.path / WEIGHTS_FILE, absent=True) as temporary:
                save_file(layer.state_dict(), temporary)
            out.commit(WEIGHTS, {WEIGHTS_FILE: {}}, key=out.path.name, **found)
        layer.load_state_dict(load_file(out.path / WEIGHTS_FILE))

    given["trained"] = trained
    options = {} if same else {key: value for key, value in projection.options().items() if key != "method"}
    fitted = find("projections", method)(*(given[name] for name in asks_for), **options)
    # weights that were damaged and trained again may be others
    key = sha256_of(out.path / WEIGHTS_FILE) if WEIGHTS in out.names() else out.path.name
    for _ in out.pieces([MAP], keys={MAP: key}):
        said = write_map(out.path / MAP_FILE, Fitted(method, cache.about["vocabulary"], student.digest(), fitted.form, fitted.student_id))
        out.commit(MAP, {MAP_FILE: said}, key=key)

    summary = {"method": method, "teacher_tokens": len(teacher), "student_tokens": len(student.vocabulary), "teacher_tokens_placed": int(np.count_nonzero(fitted.student_id != REST))}
    if WEIGHTS in out.names():
        summary |= {key: value for key, value in out.info(WEIGHTS).items() if key != "key"}
    if method == "identity":
        return summary
    progress = Progress("fit-projection", total=len(names), done=len(set(names) & set(out.names())), unit="shards")
    for name in out.pieces(names, keys=dict.fromkeys(names, key)):
        meetings: list[Meeting | None] = []
        wanted = 0
        examples = list(cache.of_shard(int(name)))
        for example in examples:
            meeting = _meeting(cache, student, example)
            meetings.append(meeting)
            wanted += len(meeting.student.answer_positions()) if meeting else 0
        records, cut = [example.record.id for example in examples], cache.about["shards"][int(name)]["groups"]
        if fitted.form == "values":
            file, inside = values_file(int(name)), 0
            words = [fitted.values(meeting, cache.temperatures) if meeting else no_values(len(cache.temperatures)) for meeting in meetings]
            said = write_values(out.path / file, records, words, cut)
            placed = sum(len(word.position) for word in words)
        else:
            file = shares_file(int(name))
            found = [fitted.shares(meeting) if meeting else no_shares() for meeting in meetings]
            said = write_shares(out.path / file, records, found, [meeting.first if meeting else np.zeros(1, dtype=np.int64) for meeting in meetings], cut)
            told = [shares.placed() for shares in found]
            placed, inside = sum(int(there.sum()) for there in told), sum(int((there & shares.inside).sum()) for there, shares in zip(told, found, strict=True))
        refused = {example.record.id: example.place for example, meeting in zip(examples, meetings, strict=True) if meeting is None}
        out.commit(name, {file: said}, key=key, student_positions=wanted, placed_positions=placed, inside=inside, refused=refused)
        progress.advance(1, wanted)
    shards = [out.info(name) for name in names]
    total = {key: sum(shard[key] for shard in shards) for key in ("student_positions", "placed_positions", "inside")}
    refused = {id: place for shard in shards for id, place in shard["refused"].items()}
    if refused:
        summary |= {"refused_records": len(refused), "refused": refused}
    if not total["placed_positions"]:
        raise InputError(
            f"At none of the student's {total['student_positions']} answer positions does projection.method {method} place any of the teacher's mass, so there would be nothing to learn from it. "
            "Look at its options, and whether the answers' texts begin a token on both sides (data.template)."
            + (f" The student's tokenizer does not keep the bytes of {len(refused)} records." if refused else "")
        )
    return summary | total | {"coverage": round(total["placed_positions"] / max(total["student_positions"], 1), 4)}


def _is_of_this_run(out: RunFolder, name: str) -> bool:
    """What was brought here from another run goes to the quarantine."""
    fits = out.info(name).get("run") == out.path.name
    if not fits:
        out.quarantine([f"commits/{name}.json", _checkpoint(out, name).relative_to(out.path).as_posix()])
    return fits


def _checkpoint(out: RunFolder, name: str) -> Path:
    return out.path / "checkpoints" / f"{name}.safetensors"


def _some(cache: Cache, positions: int, held_out: bool | None = None) -> Iterator[Example]:
    """Training records; held_out: those that are, or all others; None: all."""
    count = number = 0
    for shard in sorted(cache.shards("train"), key=lambda shard: hashlib.sha256(str(shard).encode()).digest()):
        for example in cache.of_shard(shard):
            number += 1
            if held_out is None or held_out == (number % HELD_OUT == 0):
                yield example
            count += len(example.targets.position)
        if count >= positions:
            return


def _meeting(cache: Cache, student: RecordTokenizer, example: Example) -> Meeting | None:
    """None for a record whose bytes the student's tokenizer does not keep."""
    try:
        tokens = student.render(example.record)
    except NotKept:
        return None
    targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
    return meet(example.record.content, example.tokens, targets, tokens)


def _pairs(cache: Cache, student: RecordTokenizer, held_out: bool | None) -> Iterator[tuple[Tokens, Tokens]]:
    """The teacher's and the student's tokens of training records."""
    for example in _some(cache, COUNTED_POSITIONS, held_out):
        with suppress(NotKept):
            yield example.tokens, student.render(example.record)


def _places(cache: Cache, student: RecordTokenizer, held_out: bool) -> Places:
    meetings = (_meeting(cache, student, example) for example in _some(cache, TRAINED_POSITIONS, held_out))
    return Places.joined(Places.of(meeting) for meeting in meetings if meeting)
