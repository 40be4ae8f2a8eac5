"""What training logs: metrics.jsonl and TensorBoard, and which step was the best."""

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipeline.files import appears_whole


class Log:
    """metrics.jsonl and TensorBoard, cut back to the step that is gone on from."""

    def __init__(self, folder: Path, begin: int, writes: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._writes = writes
        if writes:
            lines = lines_of(folder)[:begin]
            with appears_whole(self._path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=begin + 1)
        self.best, self._lowest = best_of(lines_of(folder)[:begin])
        """The step with the lowest validation loss so far."""

    def write(self, step: int, **values: float) -> None:
        if values.get("validation", math.inf) < self._lowest:
            self.best, self._lowest = step, values["validation"]
        if self._writes:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk: a checkpoint that is there must not lack what was logged before it."""
        if self._writes:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def last(self) -> dict[str, float]:
        lines = lines_of(self._path.parent) if self._writes else []
        return dict(json.loads(lines[-1])) if lines else {}


def lines_of(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def best_of(lines: list[str]) -> tuple[int | None, float]:
    """The first step with the lowest validation loss, and that."""
    seen = [(values["validation"], values["step"]) for values in map(json.loads, lines) if "validation" in values]
    lowest, step = min(seen, default=(math.inf, None))
    return step, lowest
