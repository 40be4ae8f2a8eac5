"""Against a reference that asks the student's tokenizer for the whole text each time: no memory, nothing cut off, no shortcut."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.tokenizers import RecordTokenizer
from pipeline.projections import contextual as module
from pipeline.signals import first_tokens
from pipeline.signals.counts import Counts
from pipeline.signals.first_tokens import FirstTokens
from pipeline.signals.projection import Meeting, Projected, at_temperature
from pipeline.signals.records import ANSWER, END, TEMPLATE, Record, Segment, Tokens, lead_as_number, number_as_lead
from pipeline.signals.targets import Targets
from tests.projections.made import (
    RECORDS,
    TEMPERATURES,
    Said,
    Toy,
    answers,
    build,
    check,
    check_sums,
    counts_of,
    distributions,
    made,
    no_counts,
    put,
    put_tokens,
    said,
    said_of_few,
    sides,
    spaced,
    unigram,
)
from tests.signals.dense import NASTY_TEXTS, asked, student, targets_of, teacher, tokens_of
from tests.signals.test_first_tokens import llama_like

REST, EXCLUDED = "the rest", "nowhere"
NASTY = [asked("Nasty?", text) for text in NASTY_TEXTS.values()]


@pytest.fixture(autouse=True)
def _texts_are_never_cut_for_their_length(monkeypatch):
    for place in (first_tokens, module):
        monkeypatch.setattr(place, "LONGEST", 10_000, raising=False)


@dataclass
class Reference:
    """What `contextual` says of a record, in plain loops."""

    one: RecordTokenizer
    other: RecordTokenizer
    counts: Counts
    depth: int = 4
    inside: bool = True
    least_mass: float = 0.05
    least_count: int = 5
    least_share: float = 0.01
    reliability: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        self.teachers, self.students = self.one.vocabulary.token_bytes, self.other.vocabulary.token_bytes
        self.end = self.other.vocabulary.end_ids[0]
        self.added = len(b"".join(self.students[id] for id in self.other.encode(["a"])[0])) - 1
        self.safe = FirstTokens(self.other.vocabulary, self.other.encode).safe

    def __call__(self, record: Record, word: Said, temperature: float) -> dict[int, np.ndarray]:
        """Student position -> its distribution over the student's tokens and, last, the rest."""
        self.a, self.b, self.certain = self.one.render(record), self.other.render(record), word.at(1.0)
        self.position = word.targets.position.tolist()
        self.row_of = {position: row for row, position in enumerate(self.position)}
        tempered, found, self.reliability = word.at(temperature), {}, {}
        for position, (row, read, before) in self.places(record).items():
            real = int(self.b.ids[position + 1])
            shares = {id: self.shares(id, row, read, before, real) for id in self.certain[row][0]}
            q = np.zeros(len(self.students) + 1)
            for id, mass in tempered[row][0].items():
                for to, share in shares[id][0].items():
                    if to != EXCLUDED:
                        q[-1 if to == REST else to] += mass * share
            kept = sum(mass * share for id, mass in self.certain[row][0].items() for to, share in shares[id][0].items() if to != EXCLUDED)
            if read and kept < self.least_mass:
                continue
            q[-1] += 0 if read else tempered[row][1]
            if q[:-1].any():
                found[position] = q / q.sum()
                usual = sum(mass * shares[id][1] for id, mass in self.certain[row][0].items())
                rest = self.certain[row][1]
                self.reliability[position] = (kept + (0 if read else rest) - usual) / ((kept if read else sum(self.certain[row][0].values())) + rest)
        return found

    def places(self, record: Record) -> dict[int, tuple[int, bytes, bytes]]:
        """Student position -> the teacher's row, the part of its token that lies before, and the text before."""
        found, taken = {}, set()
        for position in self.b.answer_positions().tolist():
            next_one = position + 1
            byte, ends = int(self.b.start[next_one]), self.b.kind[next_one] == END
            token = next((j for j in range(1, len(self.a)) if self.a.kind[j] >= ANSWER and self.a.start[j] == byte and (self.a.kind[j] == END) == ends), None)
            meets = token is not None and (byte, ends) not in taken and self.a.lead[token] == self.b.lead[next_one] and token - 1 in self.row_of
            taken.add((byte, ends))
            read = b""
            if not meets:
                token = next((j for j in range(1, len(self.a)) if self.a.kind[j] == ANSWER and self.a.start[j] < byte < self.a.end[j]), None)
                if not self.inside or ends or self.b.lead[next_one] or token is None or token - 1 not in self.row_of:
                    continue
                read = number_as_lead(int(self.a.lead[token])) + record.content[self.a.start[token] : byte]
            begin = next_one
            while self.b.kind[begin - 1] == ANSWER and self.b.kind[begin] >= ANSWER:
                begin -= 1
            before = record.content[self.b.start[begin] : byte]
            found[position] = self.row_of[token - 1], read, number_as_lead(int(self.b.lead[begin])) + before if before else b""
        return found

    def shares(self, id: int, row: int, read: bytes, before: bytes, real: int) -> tuple[dict[int | str, float], float]:
        """Where a token's mass goes, and the part of it that is shared out by counts alone."""
        token = self.teachers[id]
        if read and not (token.startswith(read) and len(token) > len(read)):
            return {EXCLUDED: 1.0}, 0.0
        if not token:
            return {self.end if id in self.one.vocabulary.end_ids else REST: 1.0}, 0.0
        new, follows = token[len(read) :], id == self.next_of(row)
        to, open = self.first(before, new)
        if follows and (open or to != real) and self.depth and self.goes_on(row):
            return self.follow(row + 1, before, new, to, real, self.depth - 1), 0.0
        if to is not None and open and not follows and not read and self.first(b"", new) == (to, open):
            shares = self.usual(id, to)
            return shares, 1 - max(share for token, share in shares.items() if token != REST)
        return {EXCLUDED if to is None else to: 1.0}, 0.0

    def follow(self, row: int, before: bytes, read: bytes, so_far: int | None, real: int, depth: int) -> dict[int | str, float]:
        kept, rest = self.certain[row]
        there = kept.get(self.next_of(row), 0.0) / (sum(kept.values()) + rest)
        others = sum(mass for id, mass in kept.items() if id != self.next_of(row))
        shares: dict[int | str, float] = {} if others else {REST: 1 - there}
        for id, mass in kept.items():
            mass = there if id == self.next_of(row) else mass / others * (1 - there)
            new = read + self.teachers[id]
            to, open = (so_far, False) if not self.teachers[id] else self.first(before, new)
            if self.teachers[id] and not is_text(before + new) and self.safe[read[-1], self.teachers[id][0]]:
                to, open = so_far, False
            if self.teachers[id] and id == self.next_of(row) and (open or to != real) and depth and self.goes_on(row):
                for further, share in self.follow(row + 1, before, new, to, real, depth - 1).items():
                    shares[further] = shares.get(further, 0.0) + mass * share
                continue
            if not self.teachers[id] and id not in self.one.vocabulary.end_ids:
                to = REST
            shares[EXCLUDED if to is None else to] = shares.get(EXCLUDED if to is None else to, 0.0) + mass
        return shares

    def first(self, before: bytes, new: bytes) -> tuple[int | None, bool]:
        """The student's token that begins after `before` (None: none does), and whether it reaches the end of the text."""
        lead, at = ("\n", -2) if self.added else ("", 0)
        text = (before + new).decode(errors="ignore") if is_text(before + new) else cut_to_text(before + new)
        size = len(text.encode())
        if size > len(before):
            for id in self.other.encode([lead + text])[0]:
                if not self.students[id]:
                    break
                if at == len(before):
                    return id, at + len(self.students[id]) >= size
                at += len(self.students[id])
                if at > len(before):
                    return None, True
        elif before and self.safe[before[-1], new[0]]:
            return self.first(b"", new)
        return next((id for n in range(len(new), 0, -1) if (id := self.other.vocabulary.id_of_bytes.get(new[:n])) is not None), None), True

    def usual(self, id: int, alone: int) -> dict[int | str, float]:
        begin, end = self.counts.begin[id], self.counts.begin[id + 1]
        seen = dict(zip(self.counts.student_id[begin:end].tolist(), self.counts.count[begin:end].tolist(), strict=True))
        total = sum(seen.values())
        if total < self.least_count:
            return {alone: 1.0}
        shares = {token: (seen.get(token, 0) + (token == alone)) / (total + 1) for token in {*seen, alone}}
        large: dict[int | str, float] = {token: share for token, share in shares.items() if share >= self.least_share}
        return large | {REST: 1 - sum(large.values())}

    def next_of(self, row: int) -> int:
        return int(self.a.ids[self.position[row] + 1])

    def goes_on(self, row: int) -> bool:
        position = self.position[row]
        return self.row_of.get(position + 1) == row + 1 and self.a.kind[position + 1] == ANSWER


def is_text(data: bytes) -> bool:
    return cut_to_text(data).encode() == data


def cut_to_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def agree(one: Any, other: Any, record: Record, word: Said, counts: Counts, temperatures: list[float], **options: Any) -> None:
    found = put(build("contextual", one, other, counts, **options), one, other, record, word.targets)
    reference = Reference(one, other, counts, **options)
    for temperature in temperatures:
        check(found, reference(record, word, temperature), temperature, len(other.vocabulary))
    np.testing.assert_allclose(found.reliability, list(reference.reliability.values()), atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    record=st.sampled_from([*RECORDS, *(record for record in NASTY if len(record.content) < 150)]),
    pair=st.sampled_from(["tiny", "tiny, turned around"]),
    keep=st.sampled_from([1, 5, 40]),
    temperature=st.sampled_from(TEMPERATURES),
    everywhere=st.booleans(),
    seed=st.integers(0, 99),
    options=st.sampled_from([{}, {}, {"depth": 0}, {"depth": 1, "inside": False}, {"least_mass": 0.5, "least_count": 1, "least_share": 0.2}]),
)
def test_a_target_is_that_of_a_slow_reference(record, pair, keep, temperature, everywhere, seed, options):
    word = said(sides(pair)[0], record, keep, seed, everywhere=everywhere)
    agree(*sides(pair), record, word, counts_of(pair), [temperature], **options)


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "unigram"])
def test_it_is_the_same_for_a_student_whose_tokenizer_puts_a_space_before_a_text(kind):
    one, other = student(), RecordTokenizer(unigram(True) if kind == "unigram" else spaced(kind), "plain", kind)
    # to a unigram model, special tokens in a text are what they look like: such a text is refused
    kept = [record for record in [*RECORDS[:4], *NASTY[1::3]] if kind != "unigram" or b"<0x0A>" not in record.content]
    for seed, record in enumerate(kept):
        agree(one, other, record, said(one, record, 12, seed), no_counts(len(one.vocabulary)), [2.0])


TEMPLATES = {
    "the answer begins inside a token": "A: {{ m.content }}{{ eos_token }}",
    "the answer begins inside a number": "A 12{{ m.content }}{{ eos_token }}",
    "the answer begins a token": "A:\n{{ m.content }}{{ eos_token }}",
    "the answer ends inside a token": "A: {{ m.content }}\n1{{ eos_token }}",
    "nothing ends an answer": "A: {{ m.content }}\n",
    "nothing stands between question and answer": "{{ m.content }}{{ eos_token }}",
}


def written(template: str, tokenizer: RecordTokenizer) -> RecordTokenizer:
    text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}" + TEMPLATES[template] + "{% else %}{{ m.context }}{{ m.content }}{% endif %}{% endfor %}"
    return RecordTokenizer(tokenizer.tokenizer, text, template)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_same_under_templates_of_any_kind(template, turned):
    one, other = (written(template, tokenizer) for tokenizer in sides("tiny, turned around" if turned else "tiny"))
    for seed, record in enumerate([*RECORDS[:2], RECORDS[5], NASTY[8]]):
        agree(one, other, record, said(one, record, 12, seed, everywhere=bool(seed % 2)), no_counts(len(one.vocabulary)), [2.0])


def test_it_is_the_same_where_the_two_templates_differ():
    names = list(TEMPLATES)
    for seed, (record, template, another) in enumerate(zip(RECORDS[4:], names, [*names[1:], names[0]], strict=False)):
        one, other = written(template, teacher()), written(another, student())
        agree(one, other, record, said(one, record, 12, seed), no_counts(len(one.vocabulary)), [2.0])


@pytest.mark.parametrize("pair", ["gemma to smollm", "gemma to llama", "gemma to qwen"])
def test_it_is_the_same_for_real_tokenizers(pair):
    one, other = sides(pair)
    method, reference = made("contextual", pair), Reference(one, other, counts_of(pair))
    for seed, record in enumerate([RECORDS[0], RECORDS[1], RECORDS[5], asked("Code?", "def f(x):\n        return x + 1.5  # 12345\n\n\n")]):
        word = said_of_few(one, record, 12, seed)
        check(put(method, one, other, record, word.targets), reference(record, word, 2.0), 2.0, len(other.vocabulary))


BROKEN = {
    "what the student reads as one with the text before is kept": (module, "EXCLUDED", -1),
    "the text before is not looked at": (FirstTokens, "left_of", lambda self, text, places, begins: [b""] * len(places)),
    "any two bytes can be cut": (first_tokens, "_safe_bounds", lambda vocabulary: np.ones((256, 256), dtype=bool)),
    "the text is not followed": (Meeting, "goes_on", property(lambda self: np.zeros(len(self.targets.position), dtype=bool))),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_control_what_is_broken_on_purpose_is_seen(broken, monkeypatch):
    one, other = sides("tiny")
    words = [(record, said(one, record, 12, seed)) for seed, record in enumerate(RECORDS)]
    monkeypatch.setattr(*BROKEN[broken])
    with pytest.raises(AssertionError):
        for record, word in words:
            agree(one, other, record, word, no_counts(len(one.vocabulary)), [2.0])


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"inside": False}, {"least_mass": 0.2}, {"least_count": 1000}, {"least_share": 0.3}])
def test_control_a_reference_with_another_option_does_not_agree(wrong):
    one, other = sides("tiny")
    with pytest.raises(AssertionError):
        for seed, record in enumerate(RECORDS):
            word = said(one, record, 12, seed)
            found = put(build("contextual", one, other, counts_of("tiny")), one, other, record, word.targets)
            check(found, Reference(one, other, counts_of("tiny"), **wrong)(record, word, 1.0), 1.0, len(other.vocabulary))


# --- worked out by hand ---

DIGITS = Toy("123x", [])
NUMBERS = Toy("123x", [("1", "2"), ("12", "3"), ("2", "x")])


def word_of(toy: Toy, record: Record, *rows: dict[str, float], keep: int = 9) -> Targets:
    """Of the first positions; END is the end. What a row leaves out has nothing; rows that are not given are sure of what follows."""
    tokens = toy.render(record)
    p = np.full((len(tokens) - 1, len(toy.vocabulary)), 1e-30)
    p[np.arange(len(p)), tokens.ids[1:]] = 1
    for at, row in enumerate(rows):
        p[at] = 1e-30
        for token, mass in row.items():
            p[at, 0 if token == "END" else toy.id(token)] = mass
    return targets_of(np.log(p), tokens, np.arange(len(p), dtype=np.int32), keep, TEMPERATURES)


def target_at(position: int, one: Toy, other: Toy, record: Record, targets: Targets, counts: Counts | None = None, **options: Any) -> dict[str, float]:
    """At temperature 1, what has mass; "rest" is the rest."""
    q = distributions(put(build("contextual", one, other, counts, **options), one, other, record, targets), 1.0, len(other.vocabulary))[position]
    names = ["END", *(token.decode() for token in other.vocabulary.token_bytes[1:]), "rest"]
    return {name: mass for name, mass in zip(names, q.tolist(), strict=True) if mass > 1e-6}


def test_what_is_there_is_followed_with_what_the_teacher_says_at_each_further_token():
    targets = word_of(DIGITS, answers("123"), {"1": 0.5, "3": 0.3, "x": 0.2}, {"2": 0.6, "1": 0.4}, {"3": 0.7, "x": 0.3})
    found = target_at(0, DIGITS, NUMBERS, answers("123"), targets)
    assert found == pytest.approx({"3": 0.3, "x": 0.2, "1": 0.5 * 0.4, "12": 0.5 * 0.6 * 0.3, "123": 0.5 * 0.6 * 0.7}, abs=1e-5)


def test_it_is_followed_for_depth_tokens_at_most():
    targets = word_of(DIGITS, answers("123"), {"1": 0.5, "3": 0.5}, {"2": 0.6, "1": 0.4}, {"3": 0.7, "x": 0.3})
    assert target_at(0, DIGITS, NUMBERS, answers("123"), targets, depth=0) == pytest.approx({"3": 0.5, "1": 0.5}, abs=1e-5)
    assert target_at(0, DIGITS, NUMBERS, answers("123"), targets, depth=1) == pytest.approx({"3": 0.5, "1": 0.5 * 0.4, "12": 0.5 * 0.6}, abs=1e-5)


def test_what_is_not_kept_of_a_further_token_is_taken_to_be_as_the_kept_ones_that_are_not_there():
    targets = word_of(DIGITS, answers("123"), {"1": 0.5, "3": 0.4, "x": 0.1}, {"2": 0.6, "1": 0.3, "x": 0.1}, keep=2)
    assert target_at(0, DIGITS, NUMBERS, answers("123"), targets) == pytest.approx({"3": 0.4, "1": 0.5 * 0.4, "123": 0.5 * 0.6, "rest": 0.1}, abs=1e-5)


def test_the_end_of_an_answer_closes_what_was_read():
    targets = word_of(DIGITS, answers("12"), {"1": 0.5, "3": 0.5}, {"2": 0.6, "END": 0.4}, {"END": 0.8, "3": 0.2})
    assert target_at(0, DIGITS, NUMBERS, answers("12"), targets) == pytest.approx({"3": 0.5, "1": 0.5 * 0.4, "12": 0.5 * 0.6 * 0.8, "123": 0.5 * 0.6 * 0.2}, abs=1e-5)


def test_an_answer_is_not_followed_into_the_next():
    targets = word_of(DIGITS, answers("1", "23"), {"1": 0.5, "3": 0.5}, {"END": 0.9, "2": 0.1})
    assert target_at(0, DIGITS, NUMBERS, answers("1", "23"), targets) == pytest.approx({"3": 0.5, "1": 0.5 * 0.9, "12": 0.5 * 0.1}, abs=1e-5)


def test_a_position_that_is_not_described_is_not_followed():
    targets = word_of(DIGITS, answers("123"), {"1": 0.5, "3": 0.5})
    second = slice(len(targets.ids) - int(targets.kept[2:].sum()), None)
    first = slice(0, int(targets.kept[0]))
    gone = replace(
        targets,
        position=targets.position[[0, 2, 3]],
        kept=targets.kept[[0, 2, 3]],
        ids=np.concatenate([targets.ids[first], targets.ids[second]]),
        logprobs=np.concatenate([targets.logprobs[first], targets.logprobs[second]]),
        rests=targets.rests[:, [0, 2, 3]],
        realised_logprob=targets.realised_logprob[[0, 2, 3]],
        entropy=None,
    )
    assert target_at(0, DIGITS, NUMBERS, answers("123"), gone) == pytest.approx({"3": 0.5, "1": 0.5}, abs=1e-5)
    assert target_at(0, DIGITS, NUMBERS, answers("123"), targets) == pytest.approx({"3": 0.5, "123": 0.5}, abs=1e-5)


def test_a_token_that_reaches_no_end_is_followed_where_another_really_stands_there():
    """Of `1x` the student reads `1` and `x`, of `1x2` it reads `1`, and of `1xx` all as one."""
    one, other = Toy("12x", [("1", "x")]), Toy("12x", [("x", "x"), ("1", "xx")])
    targets = word_of(one, answers("1xx"), {"1x": 0.5, "2": 0.5}, {"x": 0.6, "2": 0.4})
    assert target_at(0, one, other, answers("1xx"), targets) == pytest.approx({"2": 0.5, "1xx": 0.5 * 0.6, "1": 0.5 * 0.4}, abs=1e-5)
    targets = word_of(one, answers("1x2"), {"1x": 0.5, "2": 0.5}, {"x": 0.6, "2": 0.4})
    assert target_at(0, one, other, answers("1x2"), targets) == pytest.approx({"2": 0.5, "1": 0.5}, abs=1e-5)


def test_what_the_student_would_read_as_one_with_the_text_before_is_no_part_of_the_target():
    targets = word_of(DIGITS, answers("13"), {}, {"2": 0.2, "3": 0.4, "x": 0.3, "1": 0.1}, keep=3)
    assert target_at(1, DIGITS, NUMBERS, answers("13"), targets) == pytest.approx({"3": 0.4 / 0.8, "x": 0.3 / 0.8, "rest": 0.1 / 0.8}, abs=1e-5)


def test_the_templates_bytes_that_an_answer_begins_with_are_text_before():
    """`1234`, of which the `1` is the template's: `123` and `4`, though of `234` the student would make `2` and `34`."""
    one, other = Toy("1234", []), Toy("1234", [("1", "2"), ("12", "3"), ("3", "4")])
    a = tokens_of([0, 1, 2, 3], 0, ids=[one.id(token) for token in "1234"])
    b = tokens_of([2, 3], 0, ids=[other.id("123"), other.id("4")], lead=lead_as_number(b"1"))
    logits = np.log(np.full((4, len(one.vocabulary)), 0.1))
    logits[:, one.id("4")] = np.log(0.5)
    targets = targets_of(logits, a, np.array([1, 2, 3, 4], np.int32), 6, TEMPERATURES)
    for lead, mass in ((lead_as_number(b"1"), 0.5), (0, 0.0)):
        led = replace(b, lead=np.where(b.kind == ANSWER, [0, lead, 0, 0], 0))
        q = distributions(put_tokens(build("contextual", one, other), a, led, targets, len(one.vocabulary), b"234"), 1.0, len(other.vocabulary))
        assert q[1][other.id("4")] == pytest.approx(mass, abs=1e-6)


# --- what could grow and is not there ---


def seen(one: Toy, other: Toy, **times: int) -> Counts:
    """seen(one, other, a_ab=3): `a` of one stood three times where `ab` of the other stood."""
    pairs = [pair.removeprefix("_").split("_") for pair in times]
    return Counts.of_pairs(np.array([one.id(a) for a, _ in pairs], np.int32), np.array([other.id(b) for _, b in pairs], np.int32), np.array([*times.values()]), len(one.vocabulary))


SEEN = seen(DIGITS, NUMBERS, _2_2=4, _2_2x=5, _1_12=9)


def test_a_rival_that_could_grow_is_shared_out_as_often_as_each_token_stood_where_it_stood():
    """Of ten, with one event more for `2` alone, five were `2x`."""
    targets = word_of(DIGITS, answers("3x"), {"2": 0.5, "3": 0.3, "1": 0.2})
    assert target_at(0, DIGITS, NUMBERS, answers("3x"), targets, SEEN, least_count=1) == pytest.approx({"2": 0.25, "2x": 0.25, "3": 0.3, "12": 0.2 * 0.9, "1": 0.2 * 0.1}, abs=1e-5)
    found = put(build("contextual", DIGITS, NUMBERS, SEEN, least_count=1), DIGITS, NUMBERS, answers("3x"), targets)
    assert found.reliability[0] == pytest.approx(1 - 0.5 * 0.5 - 0.2 * 0.1, abs=1e-5)
    assert found.reliability[1:] == pytest.approx(1, abs=1e-5)


def test_a_rival_that_was_seen_too_rarely_stays_what_it_is_alone():
    targets = word_of(DIGITS, answers("3x"), {"2": 0.5, "3": 0.5})
    assert target_at(0, DIGITS, NUMBERS, answers("3x"), targets, SEEN, least_count=10) == pytest.approx({"2": 0.5, "3": 0.5}, abs=1e-5)


def test_shares_that_are_too_small_go_to_the_rest():
    targets = word_of(DIGITS, answers("3x"), {"1": 0.5, "3": 0.5})
    assert target_at(0, DIGITS, NUMBERS, answers("3x"), targets, SEEN, least_share=0.2) == pytest.approx({"12": 0.45, "rest": 0.05, "3": 0.5}, abs=1e-5)


def test_what_is_there_is_not_shared_out_by_counts():
    targets = word_of(DIGITS, answers("13"), {"1": 0.5, "2": 0.5})
    found = target_at(0, DIGITS, NUMBERS, answers("13"), targets, SEEN)
    assert found == pytest.approx({"1": 0.5, "2": 0.25, "2x": 0.25}, abs=1e-5)


def test_a_rival_that_cannot_grow_is_not_shared_out_by_counts():
    one = Toy("12x", [("1", "x")])
    targets = word_of(one, answers("2"), {"1x": 0.5, "2": 0.5})
    assert target_at(0, one, NUMBERS, answers("2"), targets, seen(one, NUMBERS, _1x_12=9)) == pytest.approx({"1": 0.5, "2": 0.5}, abs=1e-5)


def test_a_rival_that_is_another_token_after_the_text_before_is_not_shared_out_by_counts():
    """After `1` and `2`, which are two tokens here, `x3` would begin with `x3`; alone it begins with `x`."""
    other = Toy("123x", [("2", "x"), ("x", "3"), ("1", "1")])
    counts = seen(DIGITS, other, _x_x3=9, _1_11=9)
    targets = word_of(DIGITS, answers("33"), {}, {"x": 0.5, "1": 0.25, "3": 0.25})
    assert target_at(1, DIGITS, other, answers("33"), targets, counts) == pytest.approx({"x3": 0.45, "x": 0.05, "11": 0.225, "1": 0.025, "3": 0.25}, abs=1e-5)
    targets = word_of(DIGITS, answers("23"), {}, {"x": 0.5, "1": 0.25, "3": 0.25})
    assert target_at(1, DIGITS, other, answers("23"), targets, counts) == pytest.approx({"11": 0.45, "1": 0.05, "3": 0.5}, abs=1e-5)


# --- where the student's token begins inside a teacher's ---

PAIRS = Toy("123x", [("1", "2"), ("1", "3"), ("12", "x"), ("x", "x")])


def test_inside_a_token_only_those_take_part_that_go_on_with_the_same_bytes():
    targets = word_of(PAIRS, answers("12"), {"12": 0.3, "13": 0.15, "12x": 0.05, "1": 0.2, "2": 0.2, "xx": 0.1})
    record, single = answers("12"), Toy("123x", [])
    assert target_at(1, PAIRS, single, record, targets) == pytest.approx({"2": 0.35 / 0.5, "3": 0.15 / 0.5}, abs=1e-5)
    found = put(build("contextual", PAIRS, single), PAIRS, single, record, targets)
    assert found.position.tolist() == [0, 1, 2]
    assert (found.rests[:, 1] == -np.inf).all()
    tempered = distributions(found, 8.0, len(single.vocabulary))[1]
    assert tempered[single.id("3")] == pytest.approx(0.15 ** (1 / 8) / sum(p ** (1 / 8) for p in (0.3, 0.05, 0.15)), abs=1e-5)


def test_inside_a_token_the_text_is_followed_too():
    other = Toy("123x", [("2", "3")])
    targets = word_of(PAIRS, answers("123"), {"12": 0.6, "13": 0.4}, {"3": 0.7, "1": 0.3})
    assert target_at(1, PAIRS, other, answers("123"), targets) == pytest.approx({"3": 0.4, "23": 0.6 * 0.7, "2": 0.6 * 0.3}, abs=1e-5)


def test_inside_a_token_of_which_too_little_goes_on_so_nothing_is_said():
    targets = word_of(PAIRS, answers("12"), {"12": 0.02, "13": 0.02, "x": 0.96})
    single = Toy("123x", [])
    for options, positions in (({}, [0, 2]), ({"least_mass": 0.03}, [0, 1, 2]), ({"least_mass": 0.03, "inside": False}, [0, 2])):
        assert put(build("contextual", PAIRS, single, **options), PAIRS, single, answers("12"), targets).position.tolist() == positions


def test_inside_a_token_whose_last_bytes_are_the_templates():
    """`12`, after which the template goes on with `x`: one token of the teacher's, three of the student's."""
    single = Toy("123x", [])
    a = tokens_of([2], 0, ids=[PAIRS.id("12x")])
    b = tokens_of([1, 2, 2], 0, ids=[single.id(token) for token in "12x"])
    p = np.full((2, len(PAIRS.vocabulary)), 1e-30)
    p[0, [PAIRS.id("12x"), PAIRS.id("13")]], p[1, 0] = (0.6, 0.4), 1
    targets = targets_of(np.log(p), a, np.array([0, 1], np.int32), 6, TEMPERATURES)
    b = replace(b, kind=np.where(b.ids == single.id("x"), TEMPLATE, b.kind).astype(np.uint8))
    found = distributions(put_tokens(build("contextual", PAIRS, single), a, b, targets, len(PAIRS.vocabulary), b"12"), 1.0, len(single.vocabulary))
    assert found[1][[single.id("2"), single.id("3")]] == pytest.approx([0.6, 0.4], abs=1e-6)


def test_a_record_in_which_nothing_meets_has_no_positions():
    one, other = (written("nothing ends an answer", tokenizer) for tokenizer in sides("tiny"))
    record = asked("Nothing?", "")
    assert not len(put(build("contextual", one, other), one, other, record, said(one, record, 5, 0).targets).position)


def test_where_what_is_there_is_left_out_nothing_is_said(monkeypatch):
    """Without the text before that `3`, the `31` of `123` and `1` is one token."""
    monkeypatch.setattr(FirstTokens, "left_of", lambda self, text, places, begins: [text[:place][-1:] for place in places.tolist()])
    other = Toy("123x", [("1", "2"), ("12", "3"), ("3", "1")])
    targets = word_of(DIGITS, answers("1231"), {}, {}, {}, {"1": 0.999, "x": 0.001})
    found = put(build("contextual", DIGITS, other), DIGITS, other, answers("1231"), targets)
    q = distributions(found, 1.0, len(other.vocabulary))
    assert 1 not in q or q[1][other.id("1")] > 0.5 or found.reliability[1] < 0.01


# --- properties ---


def onto_what_is_there(pair: str, record: Record, method: str = "contextual", **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a teacher that is sure of what follows: the mass on the student's next token, and how many teacher's tokens it reaches into (0: it begins inside one)."""
    one, other = sides(pair)
    a, b = one.render(record), other.render(record)
    found = put(build(method, one, other, counts_of(pair), **options), one, other, record, said(one, record, 8, 0, onto_realised=80.0).targets)
    q = distributions(found, 1.0, len(other.vocabulary))
    begins = set(a.start[a.kind >= ANSWER].tolist())
    spans = [sum(1 for j in range(len(a)) if a.kind[j] >= ANSWER and b.start[p + 1] <= a.start[j] < max(b.end[p + 1], b.start[p + 1] + 1)) if int(b.start[p + 1]) in begins else 0 for p in q]
    return np.array([row[b.ids[p + 1]] for p, row in q.items()]), np.array(spans)


@pytest.mark.parametrize("pair", ["tiny", "tiny, turned around"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_teacher_sure_of_what_follows_makes_a_target_sure_of_it(pair, depth):
    checked = 0
    for record in [*RECORDS, *NASTY[:8], *NASTY[11:]]:
        mass, spans = onto_what_is_there(pair, record, depth=depth)
        assert mass[spans <= depth + 1] == pytest.approx(1.0, abs=1e-5)
        checked += int(((spans > 1) & (spans <= depth + 1)).sum())
    assert checked > 2


def test_a_number_longer_than_what_is_looked_at_is_counted_from_its_beginning(monkeypatch):
    """The student takes digits by three, and nowhere in a number can it be cut but there."""
    monkeypatch.undo()
    one, other, record = teacher(), llama_like(), asked("Number?", "1234567890" * 6)
    found = put(build("contextual", one, other), one, other, record, said(one, record, 8, 0, onto_realised=80.0).targets)
    b, q = other.render(record), distributions(found, 1.0, len(other.vocabulary))
    assert len(q) == len(b.answer_positions()) > 18
    assert [row[b.ids[p + 1]] for p, row in q.items()] == pytest.approx([1.0] * len(q), abs=1e-5)


def test_control_no_static_map_is_sure_where_the_teachers_token_is_shorter():
    for method in ("first_token", "exact_bytes"):
        mass, spans = onto_what_is_there("tiny", RECORDS[0], method)
        assert (mass[spans > 1] < 1e-3).all()
        assert (spans > 1).sum() > 1
    mass, spans = onto_what_is_there("tiny", RECORDS[0], depth=0)
    assert (mass[spans > 1] < 1e-3).all()


def test_text_after_the_tokens_that_are_followed_does_not_matter():
    one, other = sides("tiny")
    method = build("contextual", one, other, depth=2)
    text, same = "thinning 12345 xylo of 98765 kidneys 12 of 100.", 0
    for cut in range(8, 40):
        records = [asked("Q?", text), asked("Q?", text[:cut] + "yes ,99")]
        a, b = (one.render(record) for record in records)
        shared = int((a.ids[: min(len(a), len(b))] != b.ids[: min(len(a), len(b))]).argmax())
        word = said(one, records[0], 12, 0).targets
        words = [word, spliced(word, said(one, records[1], 12, 1).targets, shared)]
        places = [by_byte(put(method, one, other, record, targets), other.render(record), len(other.vocabulary)) for record, targets in zip(records, words, strict=True)]
        byte = int(a.start[shared - 2])  # of the token that is followed by two which both texts have
        if a.kind[shared - 2] == ANSWER and {byte} <= places[0].keys() & places[1].keys() and places[0][byte][0] == places[1][byte][0]:
            np.testing.assert_allclose(places[0][byte][1], places[1][byte][1], atol=1e-7)
            same += 1
    assert same > 5


def test_control_text_among_the_tokens_that_are_followed_matters():
    """Of `1234x` and `12xxx` the student reads `12` first; what the teacher says after `123` is only to be had of one."""
    other = Toy("1234x", [("3", "4"), ("1", "2"), ("12", "3")])
    one, rows = Toy("1234x", []), ({"1": 0.5, "x": 0.5}, {"2": 0.6, "1": 0.4}, {"3": 0.5, "x": 0.3, "4": 0.2})
    for text in ("1234x", "12xxx"):
        found = target_at(0, one, other, answers(text), word_of(one, answers(text), *rows), depth=2)
        assert found == pytest.approx({"x": 0.5, "1": 0.2, "12": 0.15, "123": 0.15}, abs=1e-5)
    found = target_at(0, one, other, answers("1234x"), word_of(one, answers("1234x"), *rows), depth=3)
    assert found == pytest.approx({"x": 0.5, "1": 0.2, "12": 0.3}, abs=1e-5)


def by_byte(found: Projected, tokens: Tokens, vocabulary: int) -> dict[int, tuple[int, np.ndarray]]:
    """Where the student's token begins -> that token and its distribution."""
    return {int(tokens.start[p + 1]): (int(tokens.ids[p + 1]), q) for p, q in distributions(found, 1.0, vocabulary).items()}


def spliced(one: Targets, other: Targets, rows: int) -> Targets:
    """The first rows of one and the others of the other."""
    of_one, of_other = int(one.kept[:rows].sum()), int(other.kept[:rows].sum())
    flat = {name: np.concatenate([getattr(one, name)[:of_one], getattr(other, name)[of_other:]]) for name in ("ids", "logprobs")}
    each = {name: np.concatenate([getattr(one, name)[:rows], getattr(other, name)[rows:]]) for name in ("position", "kept", "realised_logprob", "entropy")}
    return replace(one, rests=np.concatenate([one.rests[:, :rows], other.rests[:, rows:]], 1), **flat, **each)


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
def test_nasty_texts_make_targets_that_are_distributions(text):
    for pair in ("tiny", "tiny, turned around"):
        one, other = sides(pair)
        record = Record("two", (Segment("user", text), Segment("assistant", text), Segment("user", "?"), Segment("assistant", text + text)))
        found = put(made("contextual", pair), one, other, record, said(one, record, 12, 0).targets)
        assert (np.diff(found.position) > 0).all()
        assert ((found.reliability >= 0) & (found.reliability <= 1)).all()
        for temperature in (1.0, 3.3, 8.0):
            check_sums(at_temperature([found], TEMPERATURES, temperature))
