"""How any stage is run: found if it is finished, refused if what it needs is not, continued where it was killed."""

import importlib
import inspect
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import Experiment, named_files
from pipeline.errors import DamageError, InputError, Mismatch, NotFinished, PipelineError
from pipeline.files import read_json, write_json
from pipeline.running.code import version_of
from pipeline.running.contents import Contents, Seen, model_folder
from pipeline.running.fingerprint import Identity, differing_keys, fingerprint, named, settings_digest
from pipeline.running.folder import FinishedFolder, RunFolder, pieces_by_key, progress, read_manifest
from pipeline.running.stage import Stage

LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes", "peft", "accelerate", "pyarrow", "numpy")


@dataclass(frozen=True)
class Inputs:
    """The finished folders that a stage builds on, by the stage's name, and where the models lie that a section names."""

    folders: dict[str, FinishedFolder]
    runs: Path

    def __getitem__(self, stage: str) -> FinishedFolder:
        return self.folders[stage]

    def __contains__(self, stage: str) -> bool:
        return stage in self.folders

    def finished(self, folder: str, stage: str) -> FinishedFolder:
        """A finished folder that a section names."""
        place = Path(folder).expanduser()
        if not (place / "manifest.json").exists():
            raise InputError(f"No finished folder is at {place}, and this stage has to read it. Put it back.")
        found = FinishedFolder(place)
        if found.manifest["stage"] != stage:
            raise InputError(f"{place} is a folder of {found.manifest['stage']}, and one of {stage} is asked for.")
        return found

    def model(self, model: str, revision: str | None) -> str:
        """What to give to from_pretrained: the hub id, or the folder, which must be there."""
        if revision:
            return model
        folder = model_folder(model, self.runs)
        if model.startswith("run:") and folder.is_dir():
            if not (folder.parent / "manifest.json").exists():
                raise InputError(f"{model} has not finished: {folder.parent} has no manifest.json. Run `pipeline train-student` with its experiment file first.")
            FinishedFolder(folder.parent).folder(folder.name)
        if not folder.is_dir():
            raise InputError(f"No model folder is at {folder}, and this stage has to read it. Put it back, or give a hub id together with `revision` (the commit, 40 hexadecimal digits).")
        return str(folder)


@dataclass
class Runner:
    stages: tuple[Stage, ...]
    experiment: Experiment
    runs: Path
    given: dict[str, Path] = field(default_factory=dict)
    """--use STAGE=FOLDER: finished folders taken as they are."""
    roots: tuple[str, ...] = ()
    """--expect ROOT: each must be the root of one of these folders."""
    say: Callable[[str], None] = lambda text: None
    _identities: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._contents = Contents(self.runs)
        self._by_name = {stage.name: stage for stage in self.stages}
        for name, folder in list(self.given.items()):
            if name not in self._by_name:
                raise InputError(f"--use {name}={folder}: there is no stage '{name}'; there are {', '.join(self._by_name)}.")
            beside = self.runs / self._by_name[name].folder / folder
            if not folder.exists() and beside.exists():
                self.given[name] = folder = beside  # a fingerprint alone
            if not (folder / "manifest.json").exists():
                raise InputError(f"--use {name}={folder}: that is no finished folder (it has no manifest.json). Give <runs>/{name}/<fingerprint>.")
            manifest = read_manifest(folder)
            if manifest["stage"] != self._by_name[name].folder:
                raise InputError(f"--use {name}={folder}: that is a folder of the stage {manifest['stage']}.")
            self._identities[name] = manifest["identity"]
        found = {str(folder): FinishedFolder(folder).root for folder in self.given.values()}
        for expected in self.roots:
            if expected not in found.values():
                there = ", ".join(f"{folder} has {root}" for folder, root in found.items()) or "no folder is given with --use"
                raise Mismatch(f"--expect {expected}: {there}. Copy the right folder, or ask who gave you the root.")

    # --- what a run is ---

    def planned(self) -> list[Stage]:
        """The stages of this experiment, in order; without those that only a folder given with --use was built on."""
        wanted: set[str] = set()

        def want(stage: Stage) -> None:
            wanted.add(stage.name)
            for need in [] if stage.name in self.given else self.needs(stage):
                want(need)

        want(self.stages[-1])
        return [stage for stage in self.stages if stage.name in wanted]

    def needs(self, stage: Stage) -> list[Stage]:
        """What a stage builds on; without the control, or the teacher's own answers, where the experiment wants none."""
        wanted = self.experiment.evaluation
        unwanted = {need.name for need in self.stages if (need.same_as and not wanted.control) or (need.if_live and not (wanted.ask_teacher and wanted.live))}
        return [need for need in self.stages if need.name in stage.needs and need.name not in unwanted]

    def identity(self, stage: Stage) -> Identity:
        if stage.name not in self._identities:
            needs = {need.name: self.identity(need) for need in self.needs(stage)}
            sections = {name: self._section(stage, name) for name in stage.reads}
            self._identities[stage.name] = {
                "stage": stage.folder,
                "version": version_of(stage, named_files([getattr(self._settings(stage), name) for name in stage.reads])),
                "sections": sections,
                "needs": needs,
            }
        return self._identities[stage.name]

    def folder(self, stage: Stage) -> Path:
        if stage.name in self.given:
            return self.given[stage.name]
        return self.runs / stage.folder / fingerprint(self.identity(stage))

    def is_finished(self, stage: Stage) -> bool:
        """DamageError if its manifest is not what was written, Mismatch if it was made from other results than are here."""
        if not (self.folder(stage) / "manifest.json").exists():
            return False
        built_on = read_manifest(self.folder(stage)).get("built_on", {})
        for need in self.needs(stage) if stage.name not in self.given else ():
            with suppress(FileNotFoundError, DamageError):  # without it, or if it is damaged, there is nothing to compare with
                _refuse_other_root(self.folder(stage), need.name, built_on.get(need.name), FinishedFolder(self.folder(need)).root)
        return True

    # --- the work ---

    def run(self, name: str) -> dict[str, Any]:
        """Run one stage, or say that it is already done; what it needs must be finished or can be made on the way."""
        stage = self._by_name[name]
        folder = self.folder(stage)
        if self.is_finished(stage):
            finished = FinishedFolder(folder)
            finished.check_sizes()
            return self._report(stage, "already done", finished.summary)
        for need in self.needs(stage):
            if not self.is_finished(need):
                if not need.on_the_way:
                    raise NotFinished(
                        f"{name} needs {need.name}, which has not finished for this experiment.{self._hint(need)}\n"
                        f"Run `pipeline {need.name}` with the same file first, or give a finished folder with --use {need.name}=FOLDER."
                        + (" Without the teacher: `--set evaluation.ask_teacher=false`." if need.if_live else "")
                    )
                self.run(need.name)
        is_main = is_main_process()
        if not is_main and not stage.parallel:
            return self._made_by_another(stage)
        inputs = Inputs({need.name: FinishedFolder(self.folder(need)) for need in self.needs(stage)}, self.runs)
        sections = {section: getattr(self._settings(stage), section) for section in stage.reads}
        function = importlib.import_module(stage.module).run
        given = sections | {"machine": self.experiment.machine, "inputs": inputs}
        wanted = inspect.signature(function).parameters
        assert set(stage.reads) <= set(wanted) <= {*given, "out"}, f"{stage.module}.run must take exactly what the stage declares"
        out = RunFolder(folder, writers="none" if not is_main else "several" if stage.several else "one", settings=self._settings_digest(stage))
        try:
            if is_main:
                self.say(f"{name}: {folder}")
            built_on = {need: finished.root for need, finished in inputs.folders.items()}
            if is_main:
                write_json(folder / "key.json", self.identity(stage))
                _built_on(folder, built_on)
            started = time.monotonic()
            seen = self._contents.seen = Seen()
            self._refuse_other_inputs(stage)
            out.before_commit = partial(_refuse_changed, name, Seen(dict(seen.stats), dict(seen.listings)))
            summary = function(**{key: value for key, value in given.items() if key in wanted}, out=out)
            if is_main and not out.sealed():  # by another process
                out.before_commit()
                self._refuse_other_inputs(stage)
                out.seal(stage.folder, fingerprint(self.identity(stage)), self.identity(stage), built_on, summary, self._machine(time.monotonic() - started))
        finally:
            out.close()
        return self._report(stage, "done", summary) if is_main else self._made_by_another(stage)

    def status(self) -> list[dict[str, Any]]:
        """Per stage: state, folder, and when it is not finished the nearest run with the keys that differ."""
        rows: list[dict[str, Any]] = []
        for stage in self.planned():
            folder = self.folder(stage)
            try:
                finished = self.is_finished(stage)
                if finished:
                    FinishedFolder(folder).check_sizes()
            except (DamageError, Mismatch) as error:
                rows.append({"stage": stage.name, "state": "damaged" if isinstance(error, DamageError) else "made from another", "folder": str(folder), "nearest": None, "why": str(error)})
                continue
            if finished:
                state = "done"
            elif begun := progress(folder):
                state = f"begun {begun['done']} of {begun['total']} {begun['unit']}"
            else:
                state = "missing"
            row = {"stage": stage.name, "state": state, "folder": str(folder), "nearest": None if state == "done" else self._nearest(stage)}
            with suppress(DamageError, Mismatch):  # of what it is built on, which has a row of its own
                if state != "done" and stage.pieces and all(self.is_finished(need) for need in self.needs(stage)):
                    row["reusable"] = self._reusable(stage)
            rows.append(row)
        return rows

    # --- inside ---

    def _made_by_another(self, stage: Stage) -> dict[str, Any]:
        """Wait until the main process has finished a stage: what comes next may build on it."""
        while not self.is_finished(stage):
            time.sleep(0.2)
        return self._report(stage, "done", FinishedFolder(self.folder(stage)).summary)

    def _refuse_other_inputs(self, stage: Stage) -> None:
        """PipelineError unless the inputs are those that the folder is named after."""
        if fingerprint(self._recomputed(stage)) != fingerprint(self.identity(stage)):
            raise PipelineError(f"What {stage.name} reads changed while it ran, so nothing more is made from it. Run the command again.")

    def _settings(self, stage: Stage) -> Experiment:
        return self.experiment.without_teacher() if stage.same_as else self.experiment

    def _section(self, stage: Stage, name: str) -> Any:
        section = getattr(self._settings(stage), name).model_dump(mode="python", by_alias=True)
        return self._with_contents(section)

    def _with_contents(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._with_contents(part) for part in value]
        if not isinstance(value, dict):
            return value
        result = {key: self._with_contents(part) for key, part in value.items()}
        if isinstance(path := value.get("path"), str):
            result["path"] = named(path, self._contents.of_files(path))
        for key, content in (("model", self._contents.of_model), ("tokenizer", self._contents.of_tokenizer)):
            if isinstance(model := value.get(key), str):
                result[key] = named(model, content(model, value.get("revision")))
        for key in ("cache", "projection"):
            if isinstance(folder := value.get(key), str):
                result[key] = named(folder, self._contents.of_finished(folder))
        return result

    def _recomputed(self, stage: Stage) -> Identity:
        sections = {name: self._section(stage, name) for name in stage.reads}
        return self._identities[stage.name] | {"sections": sections}

    def _nearest(self, stage: Stage) -> dict[str, Any] | None:
        mine = self.identity(stage)
        found: list[tuple[int, str, list[str]]] = []
        runs = self.runs / stage.folder
        for folder in sorted({file.parent for name in ("key.json", "manifest.json") for file in runs.glob(f"*/{name}")} - {self.folder(stage)}):
            try:
                identity = read_manifest(folder)["identity"] if (folder / "manifest.json").exists() else read_json(folder / "key.json")
                differs = differing_keys(mine, identity)
            except (DamageError, KeyError, TypeError, AttributeError):
                continue  # another run's damage is not in the way of this one
            found.append((len(differs), str(folder), differs))
        if not found:
            return None
        _, nearest, differs = min(found)
        return {"folder": nearest, "differs": differs}

    def _reusable(self, stage: Stage) -> dict[str, int]:
        """How many pieces there are, and how many of them some run has made already."""
        inputs = {need.name: FinishedFolder(self.folder(need)) for need in self.needs(stage)}
        wanted = importlib.import_module(str(stage.pieces)).keys(self._settings_digest(stage), lambda need, name: inputs[need].file(name))
        made = pieces_by_key(self.runs / stage.folder)
        return {"of": len(wanted), "made": sum(key in made for key in wanted)}

    def _settings_digest(self, stage: Stage) -> str:
        return settings_digest(self.identity(stage), stage.not_in_pieces)

    def _hint(self, stage: Stage) -> str:
        nearest = self._nearest(stage)
        return f" (The nearest one, {nearest['folder']}, differs in: {', '.join(nearest['differs'])}.)" if nearest else ""

    def _report(self, stage: Stage, state: str, summary: dict[str, Any]) -> dict[str, Any]:
        folder = self.folder(stage)
        return {"stage": stage.name, "folder": str(folder), "fingerprint": fingerprint(self.identity(stage)), "state": state, "summary": summary}

    def _machine(self, seconds: float) -> dict[str, Any]:
        versions: dict[str, str | None] = {}
        for library in LIBRARIES:
            try:
                versions[library] = version(library)
            except PackageNotFoundError:
                versions[library] = None
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "versions": versions,
            "settings": self.experiment.machine.model_dump(mode="json"),
            "seconds": round(seconds, 1),
        }


def is_main_process() -> bool:
    """Whether this one, of the processes that torchrun or accelerate has started together, writes and tells."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_changed(name: str, seen: Seen) -> None:
    if files := seen.changed():
        raise PipelineError(f"A file that {name} reads changed while it ran, so what was made from it is not kept: {files[0]}. Run the command again.")


def _built_on(folder: Path, roots: dict[str, str]) -> None:
    """Note the roots of the results that this one is made from, or see that it was begun with the same."""
    try:
        write_json(folder / "built_on.json", roots, absent=True)
    except FileExistsError:
        before = read_json(folder / "built_on.json")
        for need, root in roots.items():
            _refuse_other_root(folder, need, before.get(need) if isinstance(before, dict) else None, root)


def _refuse_other_root(folder: Path, need: str, before: Any, now: str) -> None:
    if before != now:
        raise Mismatch(
            f"{folder} was made from another result of {need}: its root was {before}, and here it is {now}. Their settings are the same, their content is not. "
            f"Remove {folder} to have it made from this one, or give the other with --use {need}=FOLDER."
        )
