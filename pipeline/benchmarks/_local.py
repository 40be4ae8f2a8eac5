"""Questions of a local file: rows of question, options, answer_idx, and where there are such, context, specialty and split."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.datasets._rows import Row
from pipeline.errors import InputError
from pipeline.lookup import find

FIELDS = {"user": "question", "context": "context", "options": "options", "answer_index": "answer_idx", "specialty": "specialty", "group": "split"}
"""As the dataset jsonl calls them -> as they are called in the file."""


@dataclass(frozen=True)
class Question:
    where: str
    text: str
    """To the letter, as all of it: what is stripped is for the harness to say."""
    context: list[str]
    options: list[str]
    answer: int
    specialty: str | None


def questions_of(path: str, splits: Sequence[str], specialties: Collection[str], options: Sequence[str] | None, context: bool) -> tuple[dict[str, list[Question]], int]:
    """By split, its questions in the file's order; and how many of the first split are left out as of another specialty.

    splits: the one to be asked, of which a row without one is, and those to be shown as examples. specialties: those wanted;
    all if none is named. options: what a question's must be; None: any four. context: whether it has one.
    """
    asked = splits[0]
    found: dict[str, list[Question]] = {split: [] for split in splits}
    there: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for row in find("datasets", "jsonl")(path=path, fields=FIELDS):
        if row.problem:
            raise InputError(f"{row.where} {row.problem}")
        split, specialty = str(row.fields["group"] or asked), str(row.fields["specialty"] or "")
        there[split] += 1
        if split not in found:
            continue
        if specialties and not specialty:
            raise InputError(f"{row.where} has no specialty. Give each question its own: {', '.join(specialties)}.")
        if specialties and specialty not in specialties:
            others[specialty] += split == asked
        else:
            found[split].append(_question(row, specialty or None, options, context))
    if not there[asked]:
        raise InputError(f"{path} has no row whose split is {asked} (there are: {_counted(there)}). Name one of them with `split`, or give another file.")
    if not found[asked]:
        raise InputError(f"{path} has no question of these specialties: {', '.join(specialties)} (there are: {_counted(others)}). Name them so in the file.")
    return found, others.total()


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} with {count} rows" for name, count in sorted(counts.items()) if count) or "no rows at all"


def _question(row: Row, specialty: str | None, wanted: Sequence[str] | None, has_context: bool) -> Question:
    fields = row.fields
    missing = [FIELDS[key] for key in ("user", "options", "answer_index") if fields[key] is None]
    if missing:
        raise InputError(f"{row.where} has no {' and no '.join(missing)}. A question has: question, options, answer_idx (and context, specialty, split).")
    text, context, options, answer = fields["user"], fields["context"] or [], fields["options"], fields["answer_index"]
    context = [context] if isinstance(context, str) else context
    if not _texts([text]) or not _texts(context) or not _texts(options) or not text.strip():
        raise InputError(f"{row.where} must have a text as its question, a list of texts as its options, and a text or several as its context, if any. Mend it.")
    if bool(context) != has_context:
        raise InputError(
            f"{row.where} has {'no context, of which' if has_context else 'a context, and'} this benchmark asks {'its questions' if has_context else 'without one'}. Mend it, or leave the row out."
        )
    if wanted is None and len(options) != 4:
        raise InputError(f"{row.where} has {len(options)} options, and this benchmark has four. Leave the row out, or use the benchmark multiple_choice.")
    if wanted is not None and sorted(options) != sorted(wanted):
        raise InputError(f"{row.where} has the options {', '.join(options)}, and this benchmark has {', '.join(wanted)}. Write them so, or use the benchmark multiple_choice.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise InputError(f"{row.where}: answer_idx is {answer!r}, and there are {len(options)} options. Give the right one's number from 0.")
    return Question(row.where, text, context, options, answer, specialty)


def _texts(values: Any) -> bool:
    """Whether they are a list of texts, whole ones: half a character (a lone surrogate) is none."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True
