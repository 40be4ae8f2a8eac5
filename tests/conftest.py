"""Tiny models and text, made once, and the whole pipeline run on them once."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.running.folder import FinishedFolder
from stages.cli import main
from tests import tiny

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
SOAK = bool(os.environ.get("PIPELINE_SOAK"))
"""Whether the tests that try things many times try them as often as docs/reliability.md says (`make soak`)."""


COUNTED = ROOT / ".pytest_cache" / "soak.txt"


def report(figure: str) -> None:
    """Keep what a soak test has counted, to be printed at the end; the tests run in several processes."""
    if SOAK:
        COUNTED.parent.mkdir(exist_ok=True)
        with COUNTED.open("a", encoding="utf-8") as file:
            file.write(f"* {figure}\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        COUNTED.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTED.exists():
        terminalreporter.write(COUNTED.read_text(encoding="utf-8"))


@dataclass
class Place:
    """A folder to run `pipeline` in."""

    path: Path

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline", *words]
        return subprocess.Popen(command, cwd=self.path, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pipeline(self, *words: str, status: int = 0) -> str:
        """Its stdout, or its stderr where it must fail. `words` as on the command line; runs in this process."""
        result = self.invoke(*words)
        assert result.exit_code == status, f"{words} gave {result.exit_code}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr, result.stderr
        return result.stdout if status == 0 else result.stderr

    def invoke(self, *words: str) -> Result:
        before = Path.cwd()
        os.chdir(self.path)
        try:
            return CliRunner().invoke(main, list(words))
        finally:
            os.chdir(before)

    def json(self, *words: str) -> Any:
        return json.loads(self.pipeline(*words, "--json"))

    def finished(self, stage: str) -> FinishedFolder:
        """The only finished folder of a stage."""
        (manifest,) = (self.path / "runs" / stage).glob("*/manifest.json")
        return FinishedFolder(manifest.parent)


def link_inputs(source: Path, target: Path) -> Place:
    """A place with the same models and text and runs of its own."""
    target.mkdir(exist_ok=True)
    (target / "tiny").symlink_to(source / "tiny")
    return Place(target)


CONFIG = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which configs/tiny.yaml can be run."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make(folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def done(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """configs/tiny.yaml, run whole. Not to be changed."""
    place = link_inputs(made, tmp_path_factory.mktemp("done"))
    place.pipeline("run", CONFIG)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return link_inputs(made, tmp_path / "place")


@pytest.fixture
def own(tmp_path: Path) -> Place:
    """Models and text that a test may change."""
    tiny.make(tmp_path / "own" / "tiny")
    return Place(tmp_path / "own")
