"""A record as one model reads it: template, token ids, and the content bytes that every token covers."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.signals.records import ANSWER, CONTENT, END, TEMPLATE, Record, Segment, Tokens, lead_as_number
from pipeline.signals.vocabulary import Vocabulary, vocabulary_of

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Answer: {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}{% if message.context %}{{ message.context }}\n\n{% endif %}Question: {{ message.content }}\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)
A_FIXED_DAY = "26 Jul 2024"
"""What templates that print today's date are told: the same every day, or no two runs would read the same text."""


class NotKept(InputError):
    """A text that the tokenizer does not keep to the byte."""


class RecordTokenizer:
    """A model's tokenizer together with a template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"The tokenizer of {name} has no tokenizer.json, so the bytes that its tokens cover are not known. Convert it to a fast tokenizer with transformers, or choose another model."
            )
        if template == "chat" and not tokenizer.chat_template:
            raise InputError(f"The tokenizer of {name} has no chat template, and data.template is chat. Use `template: plain`, or a model that has one.")
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self._json = json.loads(tokenizer.backend_tokenizer.to_str())
        # the text of a special token inside a record is text
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()
        specials = [token["content"] for token in self._json.get("added_tokens", []) if token["special"]]
        self._special = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) or r"(?!)")
        self._bos = tokenizer.bos_token if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids else ""
        self._eos = tokenizer.eos_token or ""
        try:
            self._written = _ENVIRONMENT.from_string(PLAIN if template in ("plain", "chat") else template)
        except jinja2.TemplateError as error:
            raise InputError(f"data.template is no Jinja template: {error}.") from None
        self.vocabulary = self._vocabulary()

    def digest(self) -> str:
        """SHA-256 over all that decides how a record is rendered: equal digests, equal tokens."""
        template = self.tokenizer.get_chat_template() if self.template == "chat" else self.template
        return hashlib.sha256(json.dumps([self._plain.to_str(), template, self._bos, self._eos, self.vocabulary.end_ids]).encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts, nothing added."""
        return [encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]

    def render(self, record: Record) -> Tokens:
        """The record's tokens. InputError if the template leaves a segment out or the tokenizer does not keep its bytes."""
        parts: list[Tokens] = []
        offset = 0
        in_answer = False
        for run, special in self._runs(record):
            if run:
                parts.append(self._encode_run(record, run, offset))
                offset += sum(len(text.encode()) for text, role in run if role)
                in_answer = in_answer or any(role == "assistant" for _, role in run)
            if special is not None:
                parts.append(_one_token(special, offset, END if in_answer else TEMPLATE))
                in_answer = False
        return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "start", "end", "kind", "lead")))

    def fit(self, record: Record, max_tokens: int) -> tuple[Record, Tokens] | None:
        """The record and its tokens, its context cut at the end (between characters) so that it has max_tokens at most.

        None if cutting the context does not help: questions and answers are never cut.
        """
        tokens = self.render(record)
        if len(tokens) <= max_tokens:
            return record, tokens
        index = next((i for i, segment in enumerate(record.segments) if segment.role == "context"), None)
        if index is None:
            return None
        context = record.segments[index].text

        def with_context(length: int) -> Record:
            cut = [Segment("context", context[:length].rstrip())] if context[:length].rstrip() else []
            return replace(record, segments=(*record.segments[:index], *cut, *record.segments[index + 1 :]))

        fits, too_long = 0, len(context)
        if len(self.render(with_context(0))) > max_tokens:
            return None
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self.render(with_context(middle))) <= max_tokens:
                fits = middle
            else:
                too_long = middle
        return with_context(fits), self.render(with_context(fits))

    # --- inside ---

    def _vocabulary(self) -> Vocabulary:
        try:
            self.vocabulary = vocabulary_of(self._json)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None
        probe = Record("probe", (Segment("user", "a"), Segment("assistant", "b")))
        try:
            tokens = self.render(probe)
        except NotKept:
            raise InputError(f"The tokenizer of {self.name} does not keep the bytes of the template's own text (T5's has no line breaks, say). Give a data.template without what it lacks.") from None
        ends = [int(id) for id in tokens.ids[tokens.kind == END]]
        if self.tokenizer.eos_token_id is not None:
            ends.append(int(self.tokenizer.eos_token_id))
        return replace(self.vocabulary, end_ids=tuple(dict.fromkeys(ends)))

    def _runs(self, record: Record) -> Iterator[tuple[list[tuple[str, str | None]], int | None]]:
        """Text between special tokens, as (text, its segment's role or None for the template's), and the special token after it."""
        run: list[tuple[str, str | None]] = []
        pieces = _SENTINEL.split(self._rendered(record))
        for i, piece in enumerate(pieces):
            if i % 2:
                segment = record.segments[int(piece)]
                run.append((segment.text, segment.role))
                continue
            begin = 0
            for match in self._special.finditer(piece):
                if match.start() > begin:
                    run.append((piece[begin : match.start()], None))
                yield run, self._plain.token_to_id(match.group())
                run, begin = [], match.end()
            if begin < len(piece):
                run.append((piece[begin:], None))
        yield run, None

    def _rendered(self, record: Record) -> str:
        """The template's text with a sentinel where each segment's text belongs, so that no text is taken for template."""
        messages: list[dict[str, str]] = []
        for i, segment in enumerate(record.segments):
            sentinel = f"\ue000{i}\ue001"
            if segment.role == "context":
                messages.append({"role": "user", "context": sentinel, "content": ""})
            elif segment.role == "user" and messages and messages[-1].get("context") and not messages[-1]["content"]:
                messages[-1]["content"] = sentinel
            else:
                messages.append({"role": segment.role, "content": sentinel})
        try:
            if self.template == "chat":
                for message in messages:
                    message["content"] = "\n\n".join(filter(None, [message.pop("context", None), message["content"]]))
                # a macro: apply_chat_template makes strings of functions among its arguments
                today = "{% macro strftime_now(format) %}" + A_FIXED_DAY + "{% endmacro %}"
                text = str(self.tokenizer.apply_chat_template(messages, chat_template=today + self.tokenizer.get_chat_template(), tokenize=False, date_string=A_FIXED_DAY))
            else:
                text = self._written.render(messages=messages, bos_token=self._bos, eos_token=self._eos)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise InputError(f"The template of {self.name} cannot render record {record.id}: {error}. Choose another data.template.") from None
        if [int(i) for i in _SENTINEL.findall(text)] != list(range(len(record.segments))):
            roles = ", ".join(segment.role for segment in record.segments)
            raise InputError(f"The template of {self.name} does not show every segment of record {record.id} ({roles}) once and in order. Choose another data.template.")
        return text

    def _encode_run(self, record: Record, run: list[tuple[str, str | None]], offset: int) -> Tokens:
        raw = "".join(text for text, _ in run).encode()
        ids = np.array(self._plain.encode_batch_fast([raw.decode()], add_special_tokens=False)[0].ids, dtype=np.int32)
        joined = b"".join(map(self.vocabulary.token_bytes.__getitem__, ids.tolist()))
        # SentencePiece tokenizers may put a space of their own before the text
        dummy = int(joined == b" " + raw)
        if joined[dummy:] != raw:
            raise NotKept(
                f"The tokenizer of {self.name} does not keep the bytes of record {record.id} (it normalises its text). Normalise the text in your data in the same way, or leave the record out."
            )
        at = np.maximum(np.concatenate([[0], np.cumsum(self.vocabulary.lengths[ids])]) - dummy, 0)  # the tokens' bounds in the run
        sizes = [len(text.encode()) for text, _ in run]
        bounds = np.cumsum([0, *sizes])
        content = np.cumsum([0, *(size if role else 0 for size, (_, role) in zip(sizes, run, strict=True))])
        answer = np.cumsum([0, *(size if role == "assistant" else 0 for size, (_, role) in zip(sizes, run, strict=True))])
        # piecewise linear: flat over the template's text, rising by one per byte of content
        where = np.interp(at, bounds, content).astype(np.int64)
        answered = np.interp(at, bounds, answer).astype(np.int64)
        kind = np.where(np.diff(answered) > 0, ANSWER, np.where(np.diff(where) > 0, CONTENT, TEMPLATE)).astype(np.uint8)
        lead = np.zeros(len(ids), dtype=np.int64)
        for j in np.flatnonzero((kind != TEMPLATE) & (np.diff(at) > np.diff(where))):
            first = next(bound for bound, (_, role), size in zip(bounds, run, sizes, strict=False) if role and bound + size > at[j])
            lead[j] = lead_as_number(raw[at[j] : max(first, at[j])])
        return Tokens(ids, (offset + where[:-1]).astype(np.int32), (offset + where[1:]).astype(np.int32), kind, lead)


def load_tokenizer(source: str, revision: str | None, template: str, name: str) -> RecordTokenizer:
    """From a folder or the hub. InputError if it is not there or cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever it is that transformers finds wrong: it is the model that was named
        raise InputError(
            f"The tokenizer of {name} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]} Check the name and `revision`, or give a local folder with tokenizer.json."
        ) from None
    return RecordTokenizer(tokenizer, template, name)


_SENTINEL = re.compile("\ue000(\\d+)\ue001")
_ENVIRONMENT = ImmutableSandboxedEnvironment(keep_trailing_newline=True)


def _one_token(id: int, offset: int, kind: int) -> Tokens:
    place = np.array([offset], np.int32)
    return Tokens(np.array([id], np.int32), place, place, np.array([kind], np.uint8), np.zeros(1, np.int64))
