"""What a dataset gives: rows in the names of record fields, and how a row becomes a record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError
from pipeline.signals.records import ROLES, Record, Segment

FIELDS = ("id", "system", "context", "user", "assistant", "rationale", "messages", "specialty", "options", "answer_index", "group")
DEFAULT = {
    "id": "id",
    "user": "question",
    "context": "context",
    "assistant": "answer",
    "specialty": "specialty",
    "options": "options",
    "answer_index": "answer_idx",
}


@dataclass(frozen=True)
class Row:
    where: str
    """The file and line, or whatever lets a user find it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why it could not be read."""


def mapped(raw: Mapping[str, Any], fields: Mapping[str, Any] | None, where: str) -> Row:
    """The row in the names of record fields. `fields`: record field -> name in the file, a.b for nested ones, or a list of names."""
    names = DEFAULT if fields is None else fields
    if not isinstance(names, Mapping):
        raise InputError(f"fields must be a mapping from record fields ({', '.join(FIELDS)}) to the file's names; it is {names!r}.")
    for name in names:
        if name not in FIELDS:
            raise InputError(f"fields: '{name}' is no field of a record. There are: {', '.join(FIELDS)}.")
    return Row(where, {name: _value(raw, source) for name, source in names.items() if source is not None})


def record_of_row(row: Row, source: str, weight: float) -> Record:
    """InputError, saying where, if there is no question, no answer, or an option that does not exist."""
    if row.problem:
        raise InputError(f"{row.where} {row.problem}")
    get = row.fields.get
    options = _options(get("options"), row.where)
    index = _index(get("answer_index"), options, row.where)
    segments = _from_messages(get("messages"), row.where)
    if not segments:
        answer = _text(get("assistant")) or (options[index] if options and index is not None else "")
        if answer and (rationale := _text(get("rationale"))):
            answer = f"{answer}\n\n{rationale}"
        texts = {"system": _text(get("system")), "context": _text(get("context")), "user": _text(get("user")), "assistant": answer}
        segments = [Segment(role, text) for role, text in texts.items() if text]
    roles = [segment.role for segment in segments]
    for role, what in (("user", "question"), ("assistant", "answer")):
        if role not in roles:
            there = ", ".join(row.fields) or "none"
            raise InputError(f"{row.where} has no {what} (fields mapped: {there}). Map it with `fields: {{{role}: NAME}}`, or leave such records out with `incomplete: drop`.")
    try:
        "".join(segment.text for segment in segments).encode()
    except UnicodeEncodeError:
        raise InputError(f"{row.where} has half a character (a lone surrogate). Mend the text, or leave such records out with `incomplete: drop`.") from None
    record = Record(
        id="",
        segments=tuple(segments),
        source=source,
        specialty=_text(get("specialty")) or None,
        group=_text(get("group")) or None,
        weight=weight,
        options=options,
        answer_index=index,
    )
    id = _text(get("id")) or record.digest()[:16]
    return Record(**{**record.__dict__, "id": id})


def _value(raw: Any, source: Any) -> Any:
    if isinstance(source, list):
        return [_value(raw, name) for name in source]
    for part in [source] if isinstance(raw, Mapping) and source in raw else str(source).split("."):
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, list) and part.isdigit() and int(part) < len(raw):
            raw = raw[int(part)]
        else:
            return None
    return raw


def _text(value: Any) -> str:
    """Several fields' texts are put one below the other."""
    if isinstance(value, list):
        return "\n\n".join(filter(None, map(_text, value)))
    return "" if value is None or value != value else str(value).strip()  # NaN is how tables say that nothing is there


def _options(value: Any, where: str) -> tuple[str, ...] | None:
    if isinstance(value, str):
        raise InputError(f"{where} has its options as one text. Give a list, a mapping of letters to texts, or in `fields` a list of the fields that hold them.")
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    options = tuple(_text(option) for option in value or ())
    if not any(options):
        return None
    if len(set(options)) < max(len(options), 2) or not all(options):
        raise InputError(f"{where} has options that are no choice (fewer than two, empty or equal ones). Mend them, or leave such records out with `incomplete: drop`.")
    return options


def _index(value: Any, options: tuple[str, ...] | None, where: str) -> int | None:
    """The right option's number from 0, given as such a number, a letter, or the option's own text."""
    if value is None or not options:
        return None
    text = _text(value)
    if isinstance(value, int) or text.isdigit():
        index = int(text)
    elif len(text) == 1 and text.upper() in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        index = ord(text.upper()) - ord("A")
    else:
        index = options.index(text) if text in options else -1
    if not 0 <= index < len(options):
        raise InputError(f"{where}: the right answer is {value!r}, and there are {len(options)} options. Give its number from 0, its letter or its text.")
    return index


def _from_messages(value: Any, where: str) -> list[Segment]:
    segments = []
    for message in value or []:
        role, text = message.get("role", message.get("from")), _text(message.get("content", message.get("value")))
        role = {"human": "user", "gpt": "assistant", "model": "assistant"}.get(role, role)
        if role not in ROLES:
            raise InputError(f"{where} has a message with the role {role!r}. There are: {', '.join(ROLES)}.")
        if text:
            segments.append(Segment(role, text))
    return segments
