"""What a model is asked live, beside plain loops over plain forward passes."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.errors import InputError, NumericsError
from pipeline.models.cost import cost_of
from pipeline.models.live import LiveModel, Remembered, generation_key, likelihood_key, prompt_of
from pipeline.models.loading import load_student, load_teacher
from pipeline.models.tokenizers import NotKept, RecordTokenizer, load_tokenizer
from pipeline.running.answers import Answers
from pipeline.running.folder import RunFolder
from pipeline.signals.records import ANSWER, Record, Segment
from tests.models.real import GEMMA, LLAMA3, QWEN3, SMOLLM
from tests.models.real import tokenizer as tokenizer_of
from tests.tiny import questions

CPU = torch.device("cpu")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'distillation-pipeline[eval]'")


@pytest.fixture(scope="module", params=["student", "teacher"])
def loaded(request: pytest.FixtureRequest, made: Path) -> tuple[PreTrainedModel, RecordTokenizer]:
    """A byte-level Llama, and a Gemma with BOS and more rows in its head than tokens."""
    source = str(made / "tiny" / request.param)
    return load_student(source, None, None, CPU).eval(), load_tokenizer(source, None, "plain", request.param)


def asked(count: int) -> list[tuple[str, str]]:
    """Four options each, of unlike length; some contexts end in a space."""
    rows = list(questions(count))
    return [(f"Question: {row['question']}\nAnswer:{' ' * (n % 3 == 0)}", f" {option}"[n % 3 == 0 :]) for n, row in enumerate(rows) for option in row["options"]]


def directly(model: PreTrainedModel, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """One pass over one sequence. What a context ends in spaces with belongs to the continuation, as in the harness."""
    stripped = context.rstrip()
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(stripped)
    with torch.inference_mode():
        logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(whole) - 1)
    return sum(float(logprobs[place, whole[place + 1]]) for place in places), all(int(logprobs[place].argmax()) == whole[place + 1] for place in places)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_log_likelihoods_of_fifty_questions_are_those_of_one_pass_each(loaded: tuple[PreTrainedModel, RecordTokenizer], batch: int):
    model, tokenizer = loaded
    pairs = asked(50)
    assert len(pairs) == 200
    wanted = [directly(model, tokenizer.tokenizer, *pair) for pair in pairs]
    order = list(range(200))
    random.Random(batch).shuffle(order)
    found = LiveModel(model, tokenizer, "it", batch).loglikelihoods([pairs[place] for place in order])
    assert [logprob for logprob, _ in found] == pytest.approx([wanted[place][0] for place in order], abs=1e-4)
    assert [greedy for _, greedy in found] == [wanted[place][1] for place in order]
    assert max(abs(wanted[a][0] - wanted[b][0]) for a, b in zip(order, order[1:], strict=False)) > 1  # control: another order would be seen


def test_what_the_model_would_say_itself_is_greedy(loaded: tuple[PreTrainedModel, RecordTokenizer]):
    model, tokenizer = loaded
    for context in ("Question: What is heart cyst no 3?\nAnswer:", "A stone of the"):
        ids = tokenizer.tokenizer.encode(context)
        with torch.inference_mode():
            next_id = int(model(torch.tensor([ids])).logits[0, -1, : len(tokenizer.vocabulary)].argmax())
        told = tokenizer.tokenizer.decode([*ids, next_id], skip_special_tokens=False)[len(tokenizer.tokenizer.decode(ids, skip_special_tokens=False)) :]
        if tokenizer.tokenizer.encode(context + told) == [*ids, next_id]:
            assert LiveModel(model, tokenizer, "it", 2).loglikelihoods([(context, told), (context, " qqq")])[0][1]


class Killed(BaseException):
    pass


def test_contexts_that_are_too_long_are_counted_also_after_a_resume(loaded: tuple[PreTrainedModel, RecordTokenizer], tmp_path: Path):
    model, tokenizer = loaded
    pairs = [("cyst " * 400, " a"), ("cyst " * 3, " a"), ("cyst " * 500, " b"), ("cyst " * 500, " a")]
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        live = LiveModel(model, tokenizer, "it", 2, Answers(folder, "it"))
        assert len(live.loglikelihoods(pairs)) == 4
        assert live.cut == 2
    heard = Remembered(Answers(folder, "it").known, "it")
    heard.loglikelihoods(pairs)
    assert heard.cut == 2
    folder.close()


def test_an_option_without_room_is_refused(loaded: tuple[PreTrainedModel, RecordTokenizer]):
    model, tokenizer = loaded
    with pytest.raises(InputError, match=r"An option has \d+ tokens, and the model reads 256"):
        LiveModel(model, tokenizer, "it", 2).loglikelihoods([("a", " b"), ("a", " cyst" * 300)])


@pytest.mark.parametrize("pair", [("a", ""), ("  ", " b")])
def test_what_has_no_tokens_is_refused(made: Path, pair: tuple[str, str]):
    source = str(made / "tiny" / "student")
    model, tokenizer = load_student(source, None, None, CPU).eval(), load_tokenizer(source, None, "plain", "student")
    with pytest.raises(InputError, match="has no tokens"):
        LiveModel(model, tokenizer, "it", 2).loglikelihoods([("z", " b"), pair])


def test_a_question_without_room_for_an_answer_is_refused(loaded: tuple[PreTrainedModel, RecordTokenizer]):
    model, tokenizer = loaded
    with pytest.raises(InputError, match=r"question of record r1 has \d+ tokens, and with 250 new ones there are more than the 256 that it reads"):
        LiveModel(model, tokenizer, "it", 2).generations([record(1)], 250)


def test_after_a_kill_only_the_rest_is_asked_and_the_order_stays(loaded: tuple[PreTrainedModel, RecordTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = loaded
    pairs = asked(50)
    wanted = LiveModel(model, tokenizer, "it", 1).loglikelihoods(pairs)
    times: list[int] = []
    plain = LiveModel._likelihoods

    def dying(self: LiveModel, pairs: list[tuple[str, str]]) -> list[tuple[float, bool, bool]]:
        if len(times) == 5:
            raise Killed
        times.append(len(pairs))
        return plain(self, pairs)

    monkeypatch.setattr(LiveModel, "_likelihoods", dying)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Killed):
        LiveModel(model, tokenizer, "it", 1, Answers(folder, "it")).loglikelihoods(pairs)
    folder.close()
    assert sum(times) == 80
    folder = RunFolder(tmp_path / "run")
    times[:] = [0] * 6  # it dies no more
    assert LiveModel(model, tokenizer, "it", 1, Answers(folder, "it")).loglikelihoods(pairs) == wanted
    assert sum(times) == 120
    # another batch size asks nothing of what is known, nor does another order
    times[:] = [0] * 6
    assert LiveModel(model, tokenizer, "it", 7, Answers(folder, "it")).loglikelihoods(pairs[::-1]) == wanted[::-1]
    assert not sum(times)
    # control: what another model has said is not believed of this one
    LiveModel(model, tokenizer, "it", 7, Answers(folder, "another")).loglikelihoods(pairs[:3])
    assert sum(times) == 3
    folder.close()


def record(n: int, words: int = 3) -> Record:
    return Record(f"r{n}", (Segment("user", f"What is {' '.join(['cyst'] * words)} no {n}?"), Segment("assistant", f"A defect, {n}.")))


def by_hand(model: PreTrainedModel, tokenizer: RecordTokenizer, asked: Record, most: int) -> tuple[str, bool]:
    ids = prompt_of(tokenizer, asked)
    begin = len(ids)
    for _ in range(most):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, : len(tokenizer.vocabulary)].argmax()))
        if ids[-1] in tokenizer.vocabulary.end_ids:
            break
    ended = ids[-1] in tokenizer.vocabulary.end_ids
    text = b"".join(tokenizer.vocabulary.token_bytes[id] for id in (ids[begin:-1] if ended else ids[begin:])).decode("utf-8", "replace").strip()
    return text, ended


@pytest.mark.parametrize(("name", "template"), [(GEMMA, "plain"), (SMOLLM, "plain"), (SMOLLM, "chat"), (LLAMA3, "plain"), (LLAMA3, "chat"), (QWEN3, "plain"), (QWEN3, "chat")])
def test_no_prompt_of_a_real_model_tells_how_the_answer_begins(name: str, template: str):
    try:
        real = tokenizer_of(name, template)
    except InputError as error:
        pytest.skip(str(error))  # without a chat template
    one = prompt_of(real, record(1))
    for text in ("12 mg", "\nA", "  lead", "\tB", ":)", "A"):
        assert prompt_of(real, replace(record(1), segments=(record(1).segments[0], Segment("assistant", text)))) == one
    cut = [prompt_up_to(real, text) for text in ("12 mg", "\nA", "  lead", "The")]
    assert template == "chat" or len(set(map(tuple, cut))) > 1  # control: the rendered answers themselves do


def prompt_up_to(real: RecordTokenizer, text: str) -> list[int]:
    tokens = real.render(replace(record(1), segments=(record(1).segments[0], Segment("assistant", text))))
    return tokens.ids[: list(tokens.kind >= ANSWER).index(True)].tolist()


class Forgetful(RecordTokenizer):
    def render(self, record: Record) -> Any:
        if record.id == "r2":
            raise NotKept("its bytes are not kept")
        return super().render(record)


def test_a_record_that_the_tokenizer_does_not_keep_has_no_answer(loaded: tuple[PreTrainedModel, RecordTokenizer]):
    model, tokenizer = loaded
    forgetful = Forgetful.__new__(Forgetful)
    forgetful.__dict__ |= tokenizer.__dict__
    found = LiveModel(model, forgetful, "it", 2).generations([record(n) for n in range(4)], 5)
    assert found[2] is None
    assert [each for n, each in enumerate(found) if n != 2] == list(LiveModel(model, tokenizer, "it", 2).generations([record(n) for n in (0, 1, 3)], 5))


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_the_most_likely_tokens_one_after_another(loaded: tuple[PreTrainedModel, RecordTokenizer], batch: int):
    model, tokenizer = loaded
    records = [record(n, words=1 + 5 * (n % 3)) for n in range(7)]
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=11, max_new_tokens=2)
    found = LiveModel(model, tokenizer, "it", batch).generations(records, 12)
    assert list(found) == [by_hand(model, tokenizer, one, 12) for one in records]
    assert len({text for text, _ in found}) > 1 or "Gemma" in type(model).__name__  # which says nothing but special tokens
    assert model.generation_config.repetition_penalty == 3.0  # as it was


def test_an_answer_ends_at_its_end(made: Path):
    source = str(made / "tiny" / "student")
    model, tokenizer = load_student(source, None, None, CPU).eval(), load_tokenizer(source, None, "plain", "student")
    text, ended = by_hand(model, tokenizer, record(1), 12)
    assert not ended
    third = model_output(model, tokenizer, record(1), 12)[3]
    shorter = RecordTokenizer.__new__(RecordTokenizer)
    shorter.__dict__ |= tokenizer.__dict__ | {"vocabulary": replace(tokenizer.vocabulary, end_ids=(third,))}
    cut, ended = LiveModel(model, shorter, "it", 1).generations([record(1)], 12)[0]
    assert ended
    assert text.startswith(cut)
    assert len(cut) < len(text)


def model_output(model: PreTrainedModel, tokenizer: RecordTokenizer, asked: Record, most: int) -> list[int]:
    ids = prompt_of(tokenizer, asked)
    begin = len(ids)
    for _ in range(most):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, : len(tokenizer.vocabulary)].argmax()))
    return ids[begin:]


def test_a_prompt_is_all_before_the_last_answer(loaded: tuple[PreTrainedModel, RecordTokenizer]):
    _, tokenizer = loaded
    turns = (Segment("user", "One?"), Segment("assistant", "First."), Segment("user", "Two?"), Segment("assistant", "Second."))
    for asked in (Record("a", turns), Record("b", turns[:2]), Record("c", (Segment("context", "Some text."), *turns[:2]))):
        prompt = prompt_of(tokenizer, asked)
        for text in ("12 mg", "\nA", "  lead", "Zzz", "é", "🙂"):  # may be one token with what is before them
            assert prompt == prompt_of(tokenizer, replace(asked, segments=(*asked.segments[:-1], Segment("assistant", text))))
        shown = b"".join(tokenizer.vocabulary.token_bytes[id] for id in prompt).decode()
        assert asked.segments[-1].text not in shown
        assert all(segment.text in shown for segment in asked.segments[:-1])
        assert shown.rstrip().endswith("Answer:")


def test_what_was_asked_elsewhere_is_looked_up_and_what_was_not_is_missed():
    answers = {likelihood_key("a", "b"): [-1.5, True, False], generation_key(record(1), 5): ["text", False]}
    model = Remembered(answers, "The teacher")
    assert model.loglikelihoods([("a", "b"), ("a", "b")]) == [(-1.5, True)] * 2
    with pytest.raises(InputError, match="was not asked 1 of 2 questions"):
        model.loglikelihoods([("a", "b"), ("a", "c")])
    assert model.generations([record(1)], 5) == [("text", False)]
    for missed in (([record(1), record(2)], 5), ([record(1)], 6)):
        with pytest.raises(InputError, match="was not asked to write 1 of"):
            model.generations(*missed)
    assert Remembered(None, "it").loglikelihoods([("a", "b")]) is None
    assert Remembered(None, "it").generations([record(1)], 5) is None


def test_a_model_that_is_no_more_is_told(loaded: tuple[PreTrainedModel, RecordTokenizer], made: Path):
    _, tokenizer = loaded
    broken = load_student(str(made / "tiny" / "student"), None, None, CPU)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        LiveModel(broken, tokenizer, "it", 2).loglikelihoods([("a", " b")])


def test_what_a_model_costs(made: Path):
    source = str(made / "tiny" / "teacher")
    plain, quantized = load_student(source, None, None, CPU), load_teacher(source, None, "nf4", True, "float32", CPU)
    wanted = sum(weight.numel() for weight in plain.parameters())
    found, smaller = (cost_of(model, 300) for model in (plain, quantized))
    assert found["parameters"] == smaller["parameters"] == wanted
    assert smaller["weights_mb"] < found["weights_mb"] == pytest.approx(4e-6 * wanted, rel=0.01)
    assert found["batches"].keys() == {"1", "8"}
    for batch in found["batches"].values():
        assert batch["forward_seconds"] > 0
        assert batch["first_token_seconds"] > 0
        assert batch["tokens_per_second"] > 0
    assert (found["prompt_tokens"], found["new_tokens"]) == (128, 32)
