from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from pipeline.errors import InputError
from pipeline.models import tokenizers as module
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.signals.records import ANSWER, CONTENT, END, TEMPLATE, Record, Segment, Tokens, lead_as_number
from tests import tiny
from tests.models import real
from tests.projections.made import unigram
from tests.signals.dense import NASTY_TEXTS, asked, student, teacher

CHAT = "{{ bos_token }}{% for message in messages %}<|user|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
JINJA = (
    "{{ bos_token }}{% for m in messages %}{% if m.context %}[{{ m.context }}]\n{% endif %}"
    "{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
DIALOGUE = Record(
    "d", (Segment("system", "Be brief."), Segment("user", "What is 12 of 100?"), Segment("assistant", "A cyst 🙂."), Segment("user", "And 12345?"), Segment("assistant", "fibrosé\n\n in 4 of 100."))
)
WITH_CONTEXT = asked("What is it?", "A stone of the kidney.", context="Some context.\n \n")


@cache
def chatting(template: str = CHAT) -> RecordTokenizer:
    tokenizer = tiny.byte_level(["What is the kidney stone of 12 heart? user assistant"])
    tokenizer.chat_template = template
    return RecordTokenizer(tokenizer, "chat", "a chatting tiny")


@cache
def written(side: str) -> RecordTokenizer:
    plain = {"sentencepiece": teacher, "byte-level": student}[side]()
    return RecordTokenizer(plain.tokenizer, JINJA, "a tiny with a template")


TOKENIZERS = {
    "plain, sentencepiece": teacher,
    "plain, byte-level": student,
    "chat": chatting,
    "jinja, sentencepiece": lambda: written("sentencepiece"),
    "jinja, byte-level": lambda: written("byte-level"),
    "gemma": lambda: real.tokenizer(real.GEMMA),
    "smollm": lambda: real.tokenizer(real.SMOLLM),
    "smollm, chat": lambda: real.tokenizer(real.SMOLLM, "chat"),
}
EACH = pytest.mark.parametrize("name", TOKENIZERS)


def text_of(tokenizer: RecordTokenizer, tokens: Tokens) -> str:
    """The text that the model reads, special tokens by their names."""
    vocabulary = tokenizer.vocabulary
    return b"".join(tokenizer.tokenizer.convert_ids_to_tokens(int(id)).encode() if vocabulary.special[id] else vocabulary.token_bytes[id] for id in tokens.ids).decode()


def check_spans(record: Record, tokens: Tokens) -> None:
    """Each content byte is covered once and in order; specials and the template cover none."""
    assert (tokens.start <= tokens.end).all()
    assert tokens.start[0] == 0
    assert tokens.end[-1] == len(record.content)
    assert (tokens.end[:-1] == tokens.start[1:]).all()
    assert ((tokens.end > tokens.start) == np.isin(tokens.kind, (CONTENT, ANSWER))).all()


def check_bytes(tokenizer: RecordTokenizer, record: Record, tokens: Tokens) -> None:
    """A token of content alone is exactly the content's bytes there; another one has them among its own."""
    for id, start, end, kind, lead in zip(*(column.tolist() for column in (tokens.ids, tokens.start, tokens.end, tokens.kind, tokens.lead)), strict=True):
        token = tokenizer.vocabulary.token_bytes[id]
        if kind in (CONTENT, ANSWER) and len(token) == end - start:
            assert token == record.content[start:end]
            assert lead == 0
        elif lead:
            n = next(n for n in range(1, len(token) + 1) if record.content[start : start + 1] == token[n : n + 1] and lead_as_number(token[:n]) == lead)
            assert token[n : n + end - start] == record.content[start:end][: len(token) - n]


def check_answers(tokenizer: RecordTokenizer, record: Record, tokens: Tokens, positions: np.ndarray) -> None:
    """What follows these positions is every answer's bytes, each ended by the end token, and nothing else."""
    answers, here, first = [], [], None
    for next_one in (positions + 1).tolist():
        if tokens.kind[next_one] == END:
            assert tokens.ids[next_one] == tokenizer.vocabulary.end_ids[0]
            answers.append(record.content[first if first is not None else 0 : tokens.end[next_one]] if here else b"")
            assert all(tokens.kind[i] in (ANSWER, TEMPLATE) for i in range(here[0], next_one)) if here else True
            here, first = [], None
        else:
            first = int(tokens.start[next_one]) if first is None else first
            here.append(next_one)
    assert here == []
    assert [answer.decode() for answer in answers] == [segment.text for segment in record.segments if segment.role == "assistant"]


def check(tokenizer: RecordTokenizer, record: Record) -> Tokens:
    tokens = tokenizer.render(record)
    check_spans(record, tokens)
    check_bytes(tokenizer, record, tokens)
    check_answers(tokenizer, record, tokens, tokens.answer_positions())
    return tokens


@EACH
@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
def test_every_content_byte_is_covered_once_and_the_answers_positions_predict_the_answer_and_its_end(name: str, text: str):
    tokenizer = TOKENIZERS[name]()
    check(tokenizer, asked(text, text, context=text))
    check(tokenizer, asked("What?" + text, text + "."))
    check(tokenizer, Record("r", (Segment("user", text), Segment("assistant", "A " + text), Segment("user", "x"), Segment("assistant", text))))


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("gemma", "smollm", "smollm, chat")])
@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text(st.one_of(st.characters(codec="utf-8", exclude_characters="▁"), st.sampled_from(" \n\t19a.é")), max_size=12), min_size=3, max_size=3))
def test_any_text_is_covered_byte_for_byte(name: str, texts: list[str]):
    check(TOKENIZERS[name](), asked(texts[0], texts[1], context=texts[2]))


def test_control_positions_shifted_by_one_are_caught():
    tokens = student().render(DIALOGUE)
    positions = tokens.answer_positions()
    check_answers(student(), DIALOGUE, tokens, positions)
    for shift in (-1, 1):
        with pytest.raises((AssertionError, IndexError)):
            check_answers(student(), DIALOGUE, tokens, positions + shift)


def test_control_spans_by_the_tokenizers_own_offsets_are_caught():
    """transformers counts characters, and gives the halves of an emoji the same ones."""
    record = asked("What?", "🙂 fibrosé")
    tokens = check(student(), record)
    encoding = student().tokenizer(record.content.decode(), return_offsets_mapping=True, add_special_tokens=False)
    start, end = np.array(encoding["offset_mapping"], np.int32).T
    with pytest.raises(AssertionError):
        check_spans(record, replace(tokens, start=start, end=end, kind=np.full(len(start), CONTENT, np.uint8)))


@pytest.mark.parametrize("name", ["plain, sentencepiece", "plain, byte-level", "gemma", "smollm"])
def test_the_plain_template_reads_as_it_is_written(name: str):
    tokenizer = TOKENIZERS[name]()
    bos, eos = tokenizer._bos, tokenizer.tokenizer.eos_token
    assert text_of(tokenizer, tokenizer.render(WITH_CONTEXT)) == f"{bos}Some context.\n \n\n\nQuestion: What is it?\nAnswer: A stone of the kidney.{eos}"
    assert text_of(tokenizer, tokenizer.render(DIALOGUE)) == (f"{bos}Be brief.\n\nQuestion: What is 12 of 100?\nAnswer: A cyst 🙂.{eos}Question: And 12345?\nAnswer: fibrosé\n\n in 4 of 100.{eos}")


def test_only_a_tokenizer_that_begins_texts_with_one_gets_a_beginning_of_text():
    assert teacher()._bos == "<bos>"
    assert student()._bos == ""


def test_a_chat_template_reads_as_it_is_written():
    assert text_of(chatting(), chatting().render(WITH_CONTEXT)) == "<|user|>user\nSome context.\n \n\n\nWhat is it?<|end|>\n<|user|>assistant\nA stone of the kidney.<|end|>\n"
    tokens = chatting().render(DIALOGUE)
    assert (tokens.ids[tokens.kind == END] == chatting().tokenizer.eos_token_id).all()
    assert (tokens.kind == END).sum() == 2
    assert (tokens.ids == chatting().tokenizer.eos_token_id).sum() == 5


def test_a_template_of_ones_own_reads_as_it_is_written():
    assert text_of(written("sentencepiece"), written("sentencepiece").render(WITH_CONTEXT)) == "<bos>[Some context.\n \n]\nWhat is it?\nA: A stone of the kidney.<eos>"


def test_a_real_chat_template_reads_as_transformers_writes_it():
    tokenizer = real.tokenizer(real.SMOLLM, "chat")
    messages = [{"role": s.role, "content": s.text} for s in DIALOGUE.segments]
    assert text_of(tokenizer, tokenizer.render(DIALOGUE)) == tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.render(DIALOGUE).ids.tolist() == ids


@EACH
def test_special_tokens_in_a_text_stay_text(name: str):
    tokenizer = TOKENIZERS[name]()
    special = tokenizer.vocabulary.special
    text = " ".join(tokenizer.tokenizer.all_special_tokens) + "".join(tokenizer.tokenizer.all_special_tokens)
    plain, nasty = tokenizer.render(asked("x", "y", context="z")), tokenizer.render(asked(text, text, context=text))
    assert plain.ids[special[plain.ids]].tolist() == nasty.ids[special[nasty.ids]].tolist()
    check(tokenizer, asked(text, text, context=text))


def test_control_a_tokenizer_that_takes_special_tokens_from_texts_is_caught():
    broken = RecordTokenizer(student().tokenizer, "plain", "broken")
    broken._plain.encode_special_tokens = False
    with pytest.raises((AssertionError, InputError)):
        check(broken, asked("x", "<|end|> y"))


@EACH
def test_an_empty_context_is_as_none(name: str):
    tokenizer = TOKENIZERS[name]()
    one, none = (tokenizer.render(asked("What?", "A cyst.", context=context)) for context in ("", None))
    assert one.end[-1] == none.end[-1]
    assert one.answer_bytes() == none.answer_bytes() == 7
    assert (one.kind == END).sum() == 1


def test_the_lead_of_a_first_answer_token_is_the_templates_bytes_in_it():
    tokens = teacher().render(asked("What?", "cyst"))
    [first] = np.flatnonzero(tokens.kind == ANSWER)[:1]
    assert teacher().vocabulary.token_bytes[tokens.ids[first]].startswith(b" c")
    assert tokens.lead[first] == lead_as_number(b" ")
    assert (np.delete(tokens.lead, first) == 0).all()


DROPPING = {
    "drops the context": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "drops the system": JINJA.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    "shows one twice": JINJA + "{{ messages[0].content }}",
    "reverses": "{% for m in messages | reverse %}{{ m.context }}{{ m.content }}{% endfor %}",
    "cuts": "{% for m in messages %}{{ m.context }}{{ m.content[:1] }}{% endfor %}",
    "has its own errors": "{% for m in messages %}{{ m.content.nothing.at_all }}{% endfor %}",
}


@pytest.mark.parametrize("template", DROPPING.values(), ids=DROPPING)
def test_a_template_that_leaves_out_doubles_or_moves_a_segment_is_an_error(template: str):
    record = Record("d", (Segment("system", "S."), *WITH_CONTEXT.segments))
    with pytest.raises(InputError, match=r"data\.template"):
        RecordTokenizer(student().tokenizer, template, "tiny").render(record)


def test_a_chat_template_that_leaves_out_a_segment_or_refuses_a_role_is_an_error():
    dropping = CHAT.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    refusing = CHAT.replace("<|user|>", "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<|user|>")
    for template in (dropping, refusing):
        tokenizer = chatting(template)
        check(tokenizer, WITH_CONTEXT)
        with pytest.raises(InputError, match=r"data\.template"):
            tokenizer.render(DIALOGUE)


def test_a_chat_template_that_trims_keeps_the_texts_as_they_are():
    """It sees stand-ins for the texts, so that there is nothing to trim."""
    tokenizer = chatting(CHAT.replace("message.content", "message.content | trim"))
    check(tokenizer, asked("  What?\n", " A cyst. \n"))


def test_a_template_that_is_no_jinja_is_an_error():
    with pytest.raises(InputError, match="no Jinja template"):
        RecordTokenizer(student().tokenizer, "{% for m in %}", "tiny")


def test_a_tokenizer_without_a_chat_template_cannot_chat():
    with pytest.raises(InputError, match="has no chat template"):
        RecordTokenizer(teacher().tokenizer, "chat", "tiny")


def test_a_slow_tokenizer_is_an_error():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        RecordTokenizer(Slow(), "plain", "slow")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path), None, "plain", "nothing")


def test_a_tokenizer_that_normalises_is_an_error():
    tokenizer = tiny.byte_level(["abc"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composing = RecordTokenizer(tokenizer, "plain", "composing")
    check(composing, asked("é?", "é"))
    with pytest.raises(InputError, match="does not keep the bytes"):
        composing.render(asked("what?", "e\u0301"))


def test_a_tokenizer_that_lacks_what_the_template_writes_is_an_error():
    with pytest.raises(InputError, match="does not keep the bytes of the template"):
        RecordTokenizer(unigram(False), "plain", "like T5")


@pytest.mark.parametrize(("fallback", "kept"), [(False, 3), (True, 15)])
def test_a_unigram_tokenizer_keeps_what_it_has_letters_for_and_refuses_what_it_has_not(fallback: bool, kept: int):
    like_t5 = RecordTokenizer(unigram(fallback), "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}", "like T5")
    assert like_t5.vocabulary.special[like_t5.tokenizer.unk_token_id]
    refused = []
    for name, text in NASTY_TEXTS.items() | {("words", "a cyst of the heart")}:
        record = asked("of the heart", text)
        try:
            tokens = like_t5.render(record)
        except InputError:
            refused.append(name)
        else:
            check_spans(record, tokens)
            check_bytes(like_t5, record, tokens)
    assert "words" not in refused
    assert "special tokens as text" in refused  # pieces of the vocabulary, to a unigram model
    assert len(NASTY_TEXTS) - len(refused) >= kept, refused


def test_a_space_that_the_tokenizer_puts_before_texts_belongs_to_no_content():
    tokenizer = tiny.sentencepiece(["What is the kidney? A cyst of the heart. Question: Answer:"])
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = RecordTokenizer(tokenizer, "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "spaced")
    for question, answer in (("What?", "A cyst."), (" What?", " A cyst."), ("  ", "  A"), ("", ""), ("\n", "12")):
        record = asked(question, answer)
        tokens = spaced.render(record)
        check_spans(record, tokens)
        assert (tokens.lead == 0).all()


def test_the_vocabulary_knows_the_end_that_the_template_uses_first():
    turns = chatting(CHAT.replace("<|end|>", "<|user|>"))
    vocabulary = turns.vocabulary
    assert [turns.tokenizer.convert_ids_to_tokens(id) for id in vocabulary.end_ids] == ["<|user|>", "<|end|>"]
    assert student().vocabulary.end_ids == (student().tokenizer.eos_token_id,)


# --- fitting ---


LONG = "Das Herz schlägt 🙂👩‍👩‍👧 患者。 " * 12


@pytest.mark.parametrize("name", ["plain, sentencepiece", "plain, byte-level", "chat", "jinja, sentencepiece", "gemma"])
@pytest.mark.parametrize("room", [0, 1, 2, 7, 40, 10000])
def test_only_the_context_is_cut_to_fit_and_between_characters(name: str, room: int):
    tokenizer = TOKENIZERS[name]()
    record = asked("What is it? 🙂", "A cyst.", context=LONG)
    bare = len(tokenizer.render(asked("What is it? 🙂", "A cyst.")))
    fitted = tokenizer.fit(record, bare + room)
    assert fitted is not None
    shorter, tokens = fitted
    check(tokenizer, shorter)
    assert tokens.ids.tolist() == tokenizer.render(shorter).ids.tolist()
    assert len(tokens) <= bare + room
    assert shorter.segments[-2:] == record.segments[-2:]
    context = "".join(segment.text for segment in shorter.segments[:-2])
    assert LONG.startswith(context)
    assert context == LONG if room == 10000 else len(context) < len(LONG)
    if 7 < room < 10000:
        more = LONG[: len(context) + 4].rstrip()
        assert len(tokenizer.render(asked("What is it? 🙂", "A cyst.", context=more))) > bare + room


def test_a_question_and_an_answer_are_never_cut():
    assert student().fit(asked("What is it?", LONG), 20) is None
    assert student().fit(asked("What is it?", LONG, context="c"), 20) is None


def test_what_fits_is_left_as_it_is():
    record = asked("What?", "A cyst.", context=" c ")
    fitted, tokens = student().fit(record, len(student().render(record)))
    assert fitted is record
    assert len(tokens) == len(student().render(record))


def test_templates_that_print_the_date_print_one_day():
    tokenizer = chatting("{{ strftime_now('%d %b %Y') }}{{ date_string }}" + CHAT)
    assert text_of(tokenizer, tokenizer.render(DIALOGUE)).startswith(module.A_FIXED_DAY * 2)
