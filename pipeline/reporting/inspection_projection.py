"""What a projection is worth before anybody is trained with it, measured on held-out records of the cache."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Cache, Example
from pipeline.config import Machine, Teacher
from pipeline.errors import InputError
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.running.contents import Contents
from pipeline.running.fingerprint import fingerprint, with_names
from pipeline.running.folder import FinishedFolder
from pipeline.running.runner import Inputs
from pipeline.signals.alignment import align
from pipeline.signals.chunks import chunked
from pipeline.signals.projection import at_temperature
from pipeline.signals.records import END, Tokens
from pipeline.signals.vocabulary import Vocabulary

RECORDS = 2000
STRATA = {
    "end of the answer": None,
    "digits": re.compile(rb"\s?[0-9]"),
    "space runs": re.compile(rb"[ \t]{2}|[ \t]+$"),
    "newlines": re.compile(rb"[^\w]*[\r\n]"),
    "words": re.compile(rb"\s?[A-Za-z]"),
    "punctuation": re.compile(rb"\s?[!-/:-@\[-`{-~]"),
}
"""What the student's token is, by its bytes; the first that fits. Another's is its script."""


@dataclass
class _Sums:
    """Of the student's positions in one stratum."""

    positions: int = 0
    described: int = 0
    inside: int = 0
    placed: list[np.ndarray] = field(default_factory=list)
    realised: list[np.ndarray] = field(default_factory=list)
    reliability: list[np.ndarray] = field(default_factory=list)


def measured(folder: Path, cache_folder: Path | None, teacher_positions: int = 0, records: int = RECORDS) -> dict[str, Any]:
    """Of a finished fit-projection. cache_folder: where the cache lies, if not beside it. InputError if it is not there.

    teacher_positions: at how many the teacher itself is asked, which must be there; 0: it is not.
    """
    finished = FinishedFolder(folder)
    if finished.manifest["stage"] != "fit-projection":
        raise InputError(f"{folder} is a folder of {finished.manifest['stage']}, not a projection. Give the folder of a finished fit-projection.")
    cached = FinishedFolder(_cache_of(finished, cache_folder))
    cache = Cache(cached.file)
    named = with_names(finished.identity["sections"])["student_tokenizer"]
    source = Inputs({}, folder.absolute().parents[1]).model(named["tokenizer"], named["revision"])
    student = load_tokenizer(source, named["revision"], cache.about["template"], named["tokenizer"])
    view = StudentView(cache, finished.file, student.render, student.digest())
    if view.fitted.form == "ranks":
        raise InputError(f"projection.method {view.fitted.method} keeps values and no tokens: there is nothing to measure.")
    if view.fitted.method == "identity" and teacher_positions:
        raise InputError("This projection is the identity: its targets are what the teacher says, and there is nothing to compare. Leave out --teacher-positions.")
    split = "heldout" if cache.count("heldout") else "train"
    refused = finished.summary.get("refused", {})
    examples = list(islice((example for example in cache.examples(split) if not example.record.choice_of and example.record.id not in refused), records))
    found = _measured(view, examples, student.vocabulary, cache) | {"records": len(examples), "refused_records": len(refused), "split": split, "method": view.fitted.method}
    return found | (_against_teacher(view, cached, cache, student, examples, teacher_positions) if teacher_positions else {})


def _against_teacher(view: StudentView, cached: FinishedFolder, cache: Cache, student: RecordTokenizer, examples: list[Example], positions: int) -> dict[str, Any]:
    """How far the targets are from what the teacher says when it is asked, over all and by what the student's token is."""
    from pipeline.models.expanded import ask, compared
    from pipeline.models.loading import device_named, load_teacher

    settings = Teacher.model_validate(with_names(cached.identity["sections"])["teacher"])
    runs = cached.path.absolute().parents[1]
    named = cached.identity["sections"]["teacher"]["model"]
    if Contents(runs).of_model(settings.model, settings.revision) != named["content"]:
        raise InputError(f"{settings.model} is not the teacher that made the cache: its files are others. Put those back, or leave out --teacher-positions.")
    device = device_named(Machine().device)
    source = Inputs({}, runs).model(settings.model, settings.revision)
    model = load_teacher(source, settings.revision, settings.quantization, settings.double_quantization, settings.dtype, device)
    strata: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for asked in ask(model, device, cache.vocabulary(), student, examples, positions):
        word = view.projected(asked.example, asked.tokens)
        here = np.flatnonzero(word.position == asked.position)
        if len(here):
            name = _strata_of(asked.tokens, student.vocabulary)[asked.position]
            strata[name].append(compared(asked, at_temperature([word], cache.temperatures, 1.0), int(here[0])))
    whole = [row for rows in strata.values() for row in rows]
    if not whole:
        raise InputError(f"None of the {positions} positions has a target in this projection: there is nothing to compare.")
    return {"teacher": _distance(whole) | {"strata": {name: _distance(strata[name]) for name in _in_order(strata)}}}


def _distance(rows: list[tuple[float, float, bool]]) -> dict[str, Any]:
    """Means and standard errors."""
    tv, kl, same = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    error = max(len(rows), 1) ** 0.5
    return {"positions": len(rows)} | {
        name: round(float(value), 4) for name, value in (("tv", tv.mean()), ("tv_error", tv.std() / error), ("kl", kl.mean()), ("kl_error", kl.std() / error), ("strongest_the_same", same.mean()))
    }


def _cache_of(finished: FinishedFolder, given: Path | None) -> Path:
    need = finished.identity["needs"]["cache-teacher"]
    folder = given or finished.path.absolute().parents[1] / "cache-teacher" / fingerprint(need)
    if not (folder / "manifest.json").exists():
        raise InputError(f"The cache that {finished.path} was made for is not at {folder}. Say where it is with --cache.")
    if FinishedFolder(folder).root != finished.manifest["built_on"]["cache-teacher"]:
        raise InputError(f"{folder} is not the cache that {finished.path} was made for.")
    return folder


def _measured(view: StudentView, examples: list[Example], student: Vocabulary, cache: Cache) -> dict[str, Any]:
    strata: dict[str, _Sums] = defaultdict(_Sums)
    prior, targets = np.zeros(len(student) + 1), 0
    sure = agreeing = possible = starts = 0
    nats = {"target": 0.0, "teacher": 0.0}
    whole_bytes = covered_bytes = all_bytes = 0
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for example in examples:
        tokens = view.tokens(example)
        word = view.projected(example, tokens)
        names = _strata_of(tokens, student)
        wanted = tokens.answer_positions()
        size = tokens.end - tokens.start
        all_bytes += int(size[wanted + 1].sum())
        covered_bytes += int(size[word.position + 1].sum())
        realised = np.full(len(tokens), np.nan)
        if len(word.position):
            target = at_temperature([word], cache.temperatures, 1.0)
            ids, probs = target.ids.numpy(), target.probs.numpy().astype(np.float64)
            there = tokens.ids[word.position + 1]
            of_realised = (probs * (ids == there[:, None])).sum(1)
            # what has no place of its own is one of the rest
            realised[word.position] = -np.log(np.where(of_realised > 0, of_realised, np.maximum(target.rest.numpy(), 1e-9) / len(student)))
            np.add.at(prior, ids, probs)
            prior[-1] += float(target.rest.sum())
            targets += len(there)
            by = np.array([names[position] for position in word.position])
            for name in set(by.tolist()):
                inside = by == name
                strata[name].placed.append(probs[inside].sum(1))
                strata[name].realised.append(realised[word.position[inside]])
                strata[name].reliability.append(word.reliability[inside])
                strata[name].described += int(inside.sum())
            is_sure = _surely_followed(example, tokens, word.position)
            sure += int(is_sure.sum())
            agreeing += int((is_sure & (ids[np.arange(len(ids)), probs.argmax(1)] == there)).sum())
        for position in wanted.tolist():
            strata[names[position]].positions += 1
        at_teacher, at_student = align(example.tokens, tokens)
        mapped = view.fitted.student_id[example.tokens.ids[at_teacher + 1]]
        possible += int((mapped == tokens.ids[at_student + 1]).sum())
        starts += len(at_student)
        chunks = chunked(example.tokens, example.targets, tokens)
        for begin, end, logprob in zip(chunks.begin.tolist(), chunks.end.tolist(), chunks.logprob.tolist(), strict=True):
            if not np.isnan(realised[begin : end + 1]).any():
                nats["target"] += float(realised[begin : end + 1].sum())
                nats["teacher"] -= logprob
                whole_bytes += int(size[begin + 1 : end + 2].sum())
                seen.append((tokens.ids[begin + 1 : end + 2], realised[begin : end + 1]))
    share = prior / max(targets, 1)
    of_seen = share[np.concatenate([ids for ids, _ in seen])] if seen else np.zeros(0)
    of_prior = float(-np.log(np.where(of_seen > 0, of_seen, max(share[-1], 1e-9) / len(student))).sum())
    placed = np.concatenate([part for sums in strata.values() for part in sums.placed] or [np.zeros(0)])
    return {
        "positions": int(sum(sums.positions for sums in strata.values())),
        "coverage": _ratio(sum(sums.described for sums in strata.values()), sum(sums.positions for sums in strata.values())),
        "coverage_bytes": _ratio(covered_bytes, all_bytes),
        "retained_mass": _ratio(float(placed.sum()), len(placed)),
        "retained_mass_p10": round(float(np.quantile(placed, 0.1)), 4) if len(placed) else 0.0,
        "retained_mass_p1": round(float(np.quantile(placed, 0.01)), 4) if len(placed) else 0.0,
        "agreement": _ratio(agreeing, sure) if sure else None,
        "agreement_positions": sure,
        "agreement_ceiling": _ratio(possible, starts) if starts else None,
        "bits_per_byte_gap": round((nats["target"] - nats["teacher"]) / np.log(2) / whole_bytes, 4) if whole_bytes else None,
        # of a teacher that knows less than how often each token occurs nothing can be retained
        "ir": _ratio(of_prior - nats["target"], of_prior - nats["teacher"]) if of_prior > nats["teacher"] else None,
        **_information(view, examples, len(student)),
        "strata": {name: _stratum(strata[name]) for name in _in_order(strata)},
    }


def _stratum(sums: _Sums) -> dict[str, Any]:
    placed, realised, reliability = (np.concatenate(parts or [np.zeros(0)]) for parts in (sums.placed, sums.realised, sums.reliability))
    n = len(placed)
    return {
        "positions": sums.positions,
        "coverage": _ratio(sums.described, sums.positions),
        "retained_mass": _ratio(float(placed.sum()), n),
        "realised_nll": _ratio(float(realised.sum()), n),
        "reliability": _ratio(float(reliability.sum()), n),
    }


def _strata_of(tokens: Tokens, student: Vocabulary) -> dict[int, str]:
    """Of each answer position."""
    found = {}
    for position in tokens.answer_positions().tolist():
        token = student.token_bytes[tokens.ids[position + 1]]
        found[position] = (
            "end of the answer" if tokens.kind[position + 1] == END else next((name for name, pattern in STRATA.items() if pattern is not None and pattern.match(token)), None) or _script(token)
        )
    return found


def _script(token: bytes) -> str:
    """By its first letter: what Unicode's names of letters begin with."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "parts of characters"
    letter = next((letter for letter in text if unicodedata.category(letter)[0] in "LMN"), None)
    script = unicodedata.name(letter, "").partition(" ")[0] if letter else ""
    return (script if script == "CJK" else script.capitalize()) or "symbols"


def _in_order(strata: Collection[str]) -> list[str]:
    return [name for name in STRATA if name in strata] + sorted(set(strata) - set(STRATA))


def _surely_followed(example: Example, tokens: Tokens, position: np.ndarray) -> np.ndarray:
    """bool [P]: whether every teacher token that the student's token reaches into was the teacher's first choice."""
    targets, teacher = example.targets, example.tokens
    chosen = np.zeros(len(teacher) + 1, dtype=bool)
    first = np.concatenate([[0], np.cumsum(targets.kept.astype(np.int64))])
    top = np.array([targets.ids[a + int(targets.logprobs[a:b].argmax())] if b > a else -1 for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)])
    chosen[targets.position + 1] = top == teacher.ids[targets.position + 1]
    at_teacher, at_student = align(teacher, tokens)
    begins = dict(zip(at_student.tolist(), (at_teacher + 1).tolist(), strict=True))
    sure = np.zeros(len(position), dtype=bool)
    for i, at in enumerate(position.tolist()):
        if at in begins:
            begin, end = begins[at], begins[at]
            while tokens.kind[at + 1] != END and teacher.end[end] < tokens.end[at + 1]:
                end += 1
            sure[i] = chosen[begin : end + 1].all()
    return sure


def _information(view: StudentView, examples: list[Example], student_size: int) -> dict[str, float]:
    """Normalised mutual information (arithmetic mean) of the teacher's tokens and what a map makes of them, of ours and of a random one.

    For a map it is 2 H(Y) / (H(X) + H(Y)): how seldom it sends two tokens to one, and nothing of whether to the right one.
    """
    ids = np.concatenate([example.tokens.ids[example.tokens.answer_positions() + 1] for example in examples] or [np.zeros(0, dtype=np.int32)])
    random = np.random.default_rng(0).integers(0, student_size, len(view.fitted.student_id))
    before = _entropy(ids)

    def nmi(to: np.ndarray) -> float:
        after = _entropy(to[ids])
        return round(2 * after / max(before + after, 1e-12), 4)

    return {"nmi": nmi(view.fitted.student_id), "nmi_random_map": nmi(random)}


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    share = counts / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _said(value: float | None, form: str) -> str:
    return "not defined" if value is None else format(value, form)


def as_text(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{found['method']}: {found['records']:,} {'held-out' if found['split'] == 'heldout' else 'training'} records, {found['positions']:,} of the student's positions",
        f"  coverage              {found['coverage']:.1%} of the positions, {found['coverage_bytes']:.1%} of the bytes",
        f"  retained mass         {found['retained_mass']:.1%} on the average, {found['retained_mass_p10']:.1%} in the lowest tenth, {found['retained_mass_p1']:.1%} in the lowest hundredth",
        f"  agreement             {_said(found['agreement'], '.1%')} of {found['agreement_positions']:,} positions where the teacher's first choice follows",
        f"                        (one map of tokens could have {_said(found['agreement_ceiling'], '.1%')} of all right)",
        f"  bits per byte         {_said(found['bits_per_byte_gap'], '+.4f')} more than the teacher needs (less: it knows what it cannot)",
        f"  information retained  {_said(found['ir'], '.1%')} of what the teacher knows beyond how often each token occurs",
        f"  NMI                   {found['nmi']:.4f}; of a random map {found['nmi_random_map']:.4f}, so it says nothing of whether the right tokens get the mass",
        "",
        f"  {'':<18} {'positions':>10} {'coverage':>9} {'retained':>9} {'nats':>7} {'reliability':>12}",
    ]
    for name, row in found["strata"].items():
        lines.append(f"  {name:<18} {row['positions']:>10,} {row['coverage']:>9.1%} {row['retained_mass']:>9.1%} {row['realised_nll']:>7.3f} {row['reliability']:>12.1%}")
    if there := found.get("teacher"):
        lines += [
            "",
            f"  the teacher itself, asked at {there['positions']:,} positions: total variation {there['tv']:.3f} ± {there['tv_error']:.3f}, KL {there['kl']:.3f} ± {there['kl_error']:.3f} nats,",
            f"  the strongest token the same at {there['strongest_the_same']:.1%}",
            "",
            f"  {'':<18} {'positions':>10} {'TV':>9} {'KL':>9} {'strongest':>10}",
        ]
        lines += [f"  {name:<18} {row['positions']:>10,} {row['tv']:>9.3f} {row['kl']:>9.3f} {row['strongest_the_same']:>10.1%}" for name, row in there["strata"].items()]
    return "\n".join(lines)
