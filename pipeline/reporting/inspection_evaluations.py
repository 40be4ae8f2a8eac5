"""Finished evaluations: from the folders of `evaluate`, from those under an experiment's name, and from an ablation's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.benchmarks._records import COLUMNS, HELDOUT, RECORDS
from pipeline.cache.reader import decoding, read_table
from pipeline.errors import DamageError, InputError
from pipeline.files import read_json, sha256_of
from pipeline.reporting.comparison import DISTILLED, Evaluated, Kept
from pipeline.running.fingerprint import Identity, fingerprint
from pipeline.running.folder import FinishedFolder

STAGES = {name: name for name in ("train-student", "cache-teacher", "fit-projection", "evaluate-teacher")} | {"train-control": "train-student"}
"""What an evaluation is built on, and in which folder it lies."""
RESULTS, KEPT = "results.json", "records.parquet"
FIRST = ("model", "record", "digest", "specialty", "logprob", "tokens", "answer_bytes", "kl", "agreeing", "aligned", "chosen", "answer", "right")
"""The columns of format 1: of the held-out records alone."""
NUMBERS = [name for name in COLUMNS if not pa.types.is_string(RECORDS.field(name).type)]


@dataclass(frozen=True)
class Found:
    """An evaluation, and what it is built on, as far as that is here."""

    evaluated: Evaluated
    results: dict[str, Any]
    finished: FinishedFolder | None
    upstream: dict[str, FinishedFolder] = field(default_factory=dict)


def found_in(folders: Sequence[Path]) -> list[Found]:
    """The evaluations in all these folders, each once. InputError if one of them has none."""
    found: dict[str, Found] = {}
    for folder in folders:
        for one in _in_folder(folder):
            found.setdefault(one.finished.root if one.finished else repr(one.results), one)
    return list(found.values())


def of_trials(trials: Sequence[dict[str, Any]], place: Path) -> list[Found]:
    """The evaluations of an ablation whose folder is `place`. trials: what `running.ablation.results` gives."""
    try:
        return [_of_trial(trial["variant"], trial["seed"], trial["models"], trial["folders"], place) for trial in trials]
    except (KeyError, TypeError, AttributeError):
        raise DamageError(f"{place / 'ablation.json'} is not what `pipeline ablate` writes. Run it again.") from None


def _in_folder(folder: Path) -> Iterator[Found]:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Give runs/evaluate/<fingerprint>, or the folder of an experiment or an ablation: runs/<its name>.")
    if (folder / "ablation.json").exists():
        told = read_json(folder / "ablation.json")
        yield from of_trials(told.get("trials", None) if isinstance(told, dict) else None, folder)  # type: ignore[arg-type]
    elif (folder / "manifest.json").exists():
        finished = FinishedFolder(folder)
        stage = finished.manifest["stage"]
        if stage != "evaluate":
            raise InputError(f"{folder} is a folder of {stage}, and only evaluations can be compared. Give runs/evaluate/<fingerprint>, or runs/<name of an experiment or an ablation>.")
        yield _of_finished(finished, None, None)
    elif (folder / RESULTS).exists():
        yield _of_published(folder)
    else:
        raise InputError(f"{folder} has no evaluation that is finished: no manifest.json, no results.json and no ablation.json. Run `pipeline evaluate` first, or give another folder.")


def _of_finished(finished: FinishedFolder, variant: str | None, group: str | None) -> Found:
    needs: dict[str, Identity] = finished.identity["needs"]
    runs = {stage: fingerprint(needs[stage]) for stage in STAGES if stage in needs}
    seed = needs["train-student"]["sections"]["training"].get("seed") if "train-student" in needs else None
    results = _results(finished.file(RESULTS))
    kept = _kept(finished.file(KEPT)) if finished.names(KEPT) else None
    evaluated = Evaluated(variant or finished.fingerprint, group or fingerprint(_without_seed(finished.identity)), seed, results["models"], kept, runs, dict(_settings(finished.identity)))
    return Found(evaluated, results, finished, dict(_upstream(finished, runs)))


def _of_published(folder: Path) -> Found:
    """The evaluation that was put under an experiment's name: the run itself if it is still beside, otherwise what was put there."""
    results, digest = _results(folder / RESULTS), sha256_of(folder / RESULTS)
    for manifest in sorted((folder.parent / "evaluate").glob("*/manifest.json")):
        finished = FinishedFolder(manifest.parent)
        if finished.manifest["files"].get(RESULTS, {}).get("sha256") == digest:
            return _of_finished(finished, folder.name, None)
    kept = _kept(folder / KEPT) if (folder / KEPT).exists() else None
    return Found(Evaluated(folder.name, str(folder), None, results["models"], kept), results, None)


def _of_trial(variant: str, seed: int, models: dict[str, Any], folders: dict[str, str], place: Path) -> Found:
    group = f"{place}\0{variant}"
    there = Path(folders["evaluate"])
    for folder in (place.parent / "evaluate" / there.name, there):
        if (folder / "manifest.json").exists():
            return _of_finished(FinishedFolder(folder), variant, group)
    runs = {stage: Path(folder).name for stage, folder in folders.items()}
    return Found(Evaluated(variant, group, seed, _checked({"models": models}, place / "ablation.json")["models"], None, runs), {"models": models}, None)


def _results(file: Path) -> dict[str, Any]:
    return _checked(read_json(file), file)


def _checked(results: Any, file: Path) -> dict[str, Any]:
    models = results.get("models") if isinstance(results, dict) else None
    if not isinstance(models, dict) or DISTILLED not in models or not all(isinstance(figures, dict) and _are_tasks(figures.get("tasks", {})) for figures in models.values()):
        raise DamageError(f"{file} has no students in it: it is not what `pipeline evaluate` writes. Evaluate again.")
    return dict(results)


def _are_tasks(tasks: Any) -> bool:
    return isinstance(tasks, dict) and all(isinstance(figures, dict) for figures in tasks.values())


def _kept(file: Path) -> dict[str, Kept]:
    with decoding(file):
        first = "task" not in pq.read_schema(file).names
    table = read_table(file, pa.schema([RECORDS.field(name) for name in FIRST]) if first else RECORDS)
    with decoding(file):
        model = np.array(table["model"].to_pylist())
        tasks = [HELDOUT] * len(table) if first else table["task"].to_pylist()
        ids = list(zip(tasks, table["record"].to_pylist(), table["digest"].to_pylist(), strict=True))
        specialties = table["specialty"].to_pylist()
        nothing = np.full(len(table), np.nan)
        columns = {name: table[name].cast(pa.float64()).to_numpy() if name in table.column_names else nothing for name in NUMBERS}
    return {str(name): Kept(*_rows_at(np.flatnonzero(model == name), ids, specialties, columns)) for name in dict.fromkeys(model.tolist())}


def _rows_at(rows: np.ndarray, ids: list[Any], specialties: list[Any], columns: dict[str, np.ndarray]) -> tuple[list[Any], list[Any], dict[str, np.ndarray]]:
    return [ids[row] for row in rows], [specialties[row] for row in rows], {name: values[rows] for name, values in columns.items()}


def _upstream(finished: FinishedFolder, runs: dict[str, str]) -> Iterator[tuple[str, FinishedFolder]]:
    """By stage, the very results that it was made from, where they lie beside it."""
    for stage, named in runs.items():
        folder = finished.path.parent.parent / STAGES[stage] / named
        if (folder / "manifest.json").exists() and (there := FinishedFolder(folder)).root == finished.manifest.get("built_on", {}).get(stage):
            yield stage, there


def _without_seed(identity: Identity) -> Identity:
    sections = {name: {key: value for key, value in section.items() if (name, key) != ("training", "seed")} for name, section in identity["sections"].items()}
    return identity | {"sections": sections, "needs": {stage: _without_seed(need) for stage, need in identity["needs"].items()}}


def _settings(identity: Identity) -> Iterator[tuple[str, str]]:
    """section.key and its value as YAML, of a stage and all that it is built on; without the control, whose objective is derived."""
    for stage, need in identity["needs"].items():
        if stage != "train-control":
            yield from _settings(need)
    for section, keys in identity["sections"].items():
        if section != "student_tokenizer":  # a part of student
            for key, value in keys.items():
                yield f"{section}.{key}", yaml.safe_dump(_readable(value), default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
    yield f"{identity['stage']}.version", str(identity["version"])


def _readable(value: Any) -> Any:
    """Files and models by their names, with the beginning of their content's digest: the same name may stand for another content."""
    if isinstance(value, dict):
        return f"{value['named']} ({value['content'][:15]})" if value.keys() == {"named", "content"} else {key: _readable(part) for key, part in value.items()}
    return [_readable(part) for part in value] if isinstance(value, list) else value
