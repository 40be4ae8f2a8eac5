"""The stages' versions, and the code that they were given for."""

import json
from pathlib import Path

import pytest

from pipeline.running import code
from stages import STAGES


def test_the_lock_is_of_the_code_that_is_here():
    """If this fails: `make bless`. It renews the lock where the results are the same, and asks for a new version where they are not."""
    locked = json.loads(code.LOCK.read_text())
    assert locked == {stage.name: {"version": stage.version, "files": code.files_of(stage)} for stage in STAGES}


def test_the_files_of_a_stage_are_those_it_imports_and_those_it_finds_by_name():
    by_name = {stage.name: code.files_of(stage) for stage in STAGES}
    assert {"stages/cache_teacher.py", "pipeline/models/teacher.py", "pipeline/signals/selection.py", "pipeline/cache/writer.py"} <= by_name["cache-teacher"].keys()
    assert {"pipeline/losses/forward_kl.py", "pipeline/signals/projection.py", "pipeline/training/calibration.py"} <= by_name["train-student"].keys()
    assert "pipeline/datasets/hpo.py" in by_name["prepare-data"]
    assert "pipeline/projections/contextual.py" in by_name["fit-projection"]
    assert "pipeline/benchmarks/fidelity.py" in by_name["evaluate"]
    assert not any("reporting" in file or "running" in file for files in by_name.values() for file in files)
    assert not any("losses" in file for file in by_name["cache-teacher"])


@pytest.mark.parametrize("change", ["a byte of a module", "a module that is gone", "another version"])
def test_code_that_its_version_was_not_given_for_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    stage = next(stage for stage in STAGES if stage.name == "cache-teacher")
    assert code.version_of(stage) == stage.version
    locked = json.loads(code.LOCK.read_text())
    entry = locked[stage.name]
    if change == "a byte of a module":
        entry["files"]["pipeline/signals/selection.py"] = "0" * 64
    elif change == "a module that is gone":
        entry["files"]["pipeline/signals/gone.py"] = "0" * 64
    else:
        entry["version"] = 1
    (tmp_path / "lock").write_text(json.dumps(locked))
    monkeypatch.setattr(code, "LOCK", tmp_path / "lock")
    code._lock.cache_clear()
    try:
        assert str(code.version_of(stage)).startswith(f"{stage.version}+")
        other = next(stage for stage in STAGES if stage.name == "fit-projection")
        assert code.version_of(other) == other.version
    finally:
        monkeypatch.undo()
        code._lock.cache_clear()
