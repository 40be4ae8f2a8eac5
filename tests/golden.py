"""The digests of all that the tiny experiment results in: what must not change while the stages' versions stay.

`python tests/golden.py` prints them. `python tests/golden.py --bless` renews pipeline/running/values.lock: a stage whose
code has changed needs a higher version, or the same digests as the code that the lock was last committed with.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VARIANTS = {
    "": [],
    "everything": ["targets.logits={keep: 16, hidden: int8, boundary: true, logsumexp: true}", "targets.positions=all", "teacher.dtype=bfloat16", "data.max_tokens=48"],
    "ways": [
        "targets.attention={matched: 2}",
        "training.objective=[{loss: forward_kl, weight: {from: 0.7, to: 0.3}}, {loss: cross_entropy, weight: 0.3}, {loss: attention_match, weight: 0.1}]",
        "training.specialty_weights=current_loss",
        "training.token_temperature={strength: 0.5}",
        "training.curriculum={by: entropy, share: {from: 0.5, to: 1.0}}",
        "training.optimizer=adamw_8bit",
        "student.lora={rank: 4}",
    ],
    "sampled": ["targets.logits={method: sampled, keep: 20}", "training.objective=[{loss: forward_kl}]", "training.temperature=1.0"],
}
MEASURED = ("tokens_per_second", "peak_memory_mb", "seconds", "cost")


def digests(root: Path = ROOT) -> dict[str, Any]:
    """Of the code in `root`, by stage and variant: of each file its SHA-256, or of a JSON what it says without what is measured."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([sys.executable, str(root / "tests" / "tiny.py"), "tiny"], **here)
        for variant, changes in VARIANTS.items():
            options = [word for change in changes for word in ("--set", change)]
            subprocess.run([sys.executable, "-m", "pipeline", "--runs", f"runs{variant}", "run", str(root / "configs" / "tiny.yaml"), *options], **here)
            for manifest in sorted(Path(folder, f"runs{variant}").glob("*/*/manifest.json")):
                said = json.loads(manifest.read_text(encoding="utf-8"))
                named = {name: _digest(manifest.parent / name, entry["sha256"]) for name, entry in said["files"].items() if not name.endswith((".png", ".md"))}
                found.setdefault(said["stage"], {}).setdefault(variant, []).append(named)
    return {stage: {variant: sorted(runs, key=json.dumps) for variant, runs in variants.items()} for stage, variants in found.items()}


def _digest(file: Path, sha256: str) -> Any:
    return _without_measured(json.loads(file.read_text(encoding="utf-8"))) if file.suffix == ".json" and "/student/" not in file.as_posix() else sha256


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(part) for key, part in value.items() if key not in MEASURED}
    return [_without_measured(part) for part in value] if isinstance(value, list) else value


def bless() -> None:
    sys.path.insert(0, str(ROOT))
    from pipeline.files import write_json
    from pipeline.running.code import LOCK, files_of
    from stages import STAGES

    locked = json.loads(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    now = {stage.name: {"version": stage.version, "files": files_of(stage)} for stage in STAGES}
    changed = [stage for stage in STAGES if stage.name in locked and locked[stage.name] != now[stage.name] and locked[stage.name]["version"] == stage.version]
    if changed:
        print(f"Changed with the same version: {', '.join(stage.name for stage in changed)}. Comparing results ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            commit = subprocess.run(["git", "log", "-1", "--format=%H", "--", str(LOCK)], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", f"{folder}/then", commit], cwd=ROOT, check=True)
            try:
                before = digests(Path(folder, "then"))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", f"{folder}/then"], cwd=ROOT, check=True)
        after = digests()
        if wrong := [stage.name for stage in changed if before.get(stage.folder) != after.get(stage.folder)]:
            raise SystemExit(f"The results of {', '.join(wrong)} are others than before. If they are meant to be, raise the version in stages/__init__.py.")
    write_json(LOCK, now)


if __name__ == "__main__":
    bless() if sys.argv[1:] == ["--bless"] else print(json.dumps(digests()))
