"""The map of architecture.md: imports point down, and what knows tensors does not know how stages are run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = ("pipeline/signals", "pipeline/losses", "pipeline/projections")
MODEL_LIBRARIES = {"transformers", "bitsandbytes", "peft"}
TENSOR_LIBRARIES = {"torch", "transformers", "bitsandbytes", "peft", "accelerate", "safetensors", "numpy", "pyarrow", "datasets", "matplotlib"}


def imported(source: str) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def violations(path: str, source: str) -> list[str]:
    modules = imported(source)
    tops = {module.split(".")[0] for module in modules}
    wrong = []
    if path.startswith("pipeline/") and "stages" in tops:
        wrong.append("pipeline/ never imports stages/")
    if path.startswith("stages/") and path != "stages/cli.py" and "stages" in tops:
        wrong.append("stages meet through folders on disk, not through imports")
    if path.startswith(PURE):
        inner = {module for module in modules if module.startswith("pipeline.")}
        allowed = ("pipeline.signals", "pipeline.losses", "pipeline.projections", "pipeline.errors", "pipeline.options")
        if any(not module.startswith(allowed) for module in inner) or tops & {"pathlib", "os", "yaml"}:
            wrong.append("signals, losses and projections are pure: no files, no settings, no models")
    if not path.startswith(("pipeline/models/", "tests/")) and tops & MODEL_LIBRARIES:
        wrong.append("only pipeline/models/ imports transformers, bitsandbytes, peft")
    if path.startswith("pipeline/running/") and (tops & TENSOR_LIBRARIES or any(m.startswith(("pipeline.signals", "pipeline.models", "pipeline.cache", "pipeline.training")) for m in modules)):
        wrong.append("pipeline/running/ knows nothing of tensors")
    if path.startswith("pipeline/") and not path.startswith(("pipeline/running/", "pipeline/reporting/inspection")) and any(m.startswith("pipeline.running") for m in modules):
        wrong.append("only stages know how they are run")
    if path in ("stages/cli.py", "stages/__init__.py") and tops & TENSOR_LIBRARIES:
        wrong.append("the command line imports nothing heavy")
    if "pickle" in tops or "torch.load(" in source or ("yaml.load(" in source and "Loader=_Loader" not in source):
        wrong.append("no pickle, no unsafe YAML")
    return wrong


def sources() -> list[Path]:
    return [file for folder in ("pipeline", "stages") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_file_is_in_the_right_house(file: Path):
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("pipeline/losses/x.py", "from stages.cli import main"),
        ("stages/evaluate.py", "from stages import train_student"),
        ("pipeline/signals/x.py", "from pipeline.config import Data"),
        ("pipeline/losses/x.py", "from pathlib import Path"),
        ("pipeline/training/x.py", "import transformers"),
        ("pipeline/running/runner.py", "def f():\n    import torch"),
        ("pipeline/cache/reader.py", "from pipeline.running.folder import RunFolder"),
        ("stages/cli.py", "import numpy"),
        ("pipeline/training/x.py", "import pickle"),
    ],
)
def test_a_planted_violation_is_found(path: str, planted: str):
    assert violations(path, planted)


def test_a_stage_takes_what_it_declares_and_nothing_else():
    from stages import STAGES

    for stage in STAGES:
        tree = ast.parse((ROOT / (stage.module.replace(".", "/") + ".py")).read_text())
        run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
        taken = {argument.arg for argument in run.args.args}
        assert set(stage.reads) <= taken <= {*stage.reads, "machine", "inputs", "out"}, stage.name
        assert all(need in {other.name for other in STAGES} for need in stage.needs)


def test_every_named_function_is_alone_in_the_file_of_its_name():
    from pipeline.lookup import names, parameters

    for kind in ("losses", "projections", "datasets", "benchmarks"):
        assert names(kind)
        for name in names(kind):
            parameters(kind, name)
