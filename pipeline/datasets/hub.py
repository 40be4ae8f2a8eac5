import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from pipeline.datasets._rows import Row, mapped
from pipeline.errors import InputError
from pipeline.options import Fields


def hub(*, repo: str, revision: str, split: str = "train", subset: str | None = None, fields: Fields | None = None) -> Iterator[Row]:
    """The rows of a Hugging Face dataset at a pinned commit (40 hexadecimal digits)."""
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"The dataset {repo} needs `revision`, the commit as 40 hexadecimal digits; {revision!r} may be another thing tomorrow.")
    if Path(repo).exists():
        raise InputError(f"A folder named {repo} is here and would be read instead of the hub. Run the command elsewhere, or give the files with `dataset: jsonl`.")
    try:
        rows = datasets.load_dataset(repo, subset, revision=revision, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise InputError(f"The dataset {repo} ({split}) cannot be loaded: {str(error).splitlines()[0]} Check the name, `revision`, `split` and that you are logged in.") from None
    for number, raw in enumerate(rows):
        yield mapped(raw, fields, f"{repo} {split} row {number}")
