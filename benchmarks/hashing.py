"""What hashing, syncing and reading back cost in cache-teacher: their share of the stage's time, in one run.

    python benchmarks/hashing.py configs/demo.yaml [--set section.key=value ...]

Runs prepare-data and cache-teacher of the experiment in a new folder. Weights are hashed once and remembered; that is counted, too.
Prints one JSON object; seconds in the writer's thread are counted although the teacher computes meanwhile.
"""

import functools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pipeline.cache.digest
import pipeline.files

SECONDS: Counter[str] = Counter()


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            SECONDS[name] += time.perf_counter() - begin

    return call


def main() -> None:
    # before anything else imports them by name
    pipeline.files.sha256_of = timed("sha256", pipeline.files.sha256_of)
    pipeline.files.sync = timed("sync", pipeline.files.sync)
    pipeline.cache.digest.rows_digest = timed("rows_digest", pipeline.cache.digest.rows_digest)
    import pyarrow.parquet

    pyarrow.parquet.read_table = timed("read back", pyarrow.parquet.read_table)
    from stages.cli import main as command

    with tempfile.TemporaryDirectory() as runs:
        command(["--runs", runs, "prepare-data", *sys.argv[1:]], standalone_mode=False)
        SECONDS.clear()
        begin = time.perf_counter()
        command(["--runs", runs, "cache-teacher", *sys.argv[1:]], standalone_mode=False)
        whole = time.perf_counter() - begin
    parts = {name: round(seconds, 2) for name, seconds in SECONDS.items()}
    print(json.dumps({"seconds": round(whole, 1), "of_these": parts, "share": round(sum(SECONDS.values()) / whole, 4)}))


if __name__ == "__main__":
    main()
