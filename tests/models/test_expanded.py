"""The teacher's own word on the student's next token, against plain loops without a key-value cache."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.cache.reader import Cache
from pipeline.models import expanded
from pipeline.models.expanded import ask, compared
from pipeline.models.tokenizers import load_tokenizer
from pipeline.signals.first_tokens import NONE, FirstTokens
from pipeline.signals.projection import SparseTarget
from pipeline.signals.records import ANSWER
from tests.conftest import Place


@pytest.fixture(autouse=True)
def many_tokens_are_likely(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expanded, "NEXT", 10_000)


def test_likely_tokens_are_expanded_with_the_teacher_and_read_off_by_the_students_tokenizer(done: Place):
    cache = Cache(done.finished("cache-teacher").file)
    model = AutoModelForCausalLM.from_pretrained(done.path / "tiny" / "teacher", dtype=torch.float32).eval()
    model.lm_head.weight.data *= 0.5  # less sure
    student = load_tokenizer(str(done.path / "tiny" / "student"), None, cache.about["template"], "student")
    teacher, first = cache.vocabulary(), FirstTokens(student.vocabulary, student.encode)

    examples = [example for example in cache.examples("heldout") if not example.record.choice_of]

    @torch.inference_mode()
    def says(ids: list[int]) -> np.ndarray:
        return model(torch.tensor([ids])).logits[0, -1, : len(teacher)].double().softmax(-1).numpy()

    seen = 0
    for asked in ask(model, torch.device("cpu"), teacher, student, examples, 6):
        tokens, ours = asked.tokens, asked.example.tokens
        byte = int(tokens.start[asked.position + 1])
        begin = next(at for at in range(asked.position + 1, -1, -1) if tokens.kind[at - 1] != ANSWER)
        left = asked.example.record.content[tokens.start[begin] : byte]
        row = next(at for at in range(len(ours)) if ours.kind[at] >= ANSWER and ours.start[at] == byte and (ours.kind[at] == ANSWER) == (tokens.kind[asked.position + 1] == ANSWER))
        prefix = ours.ids[:row].tolist()
        p, q = says(prefix), np.zeros(len(student.vocabulary))
        likely = [id for id in np.argsort(-p, kind="stable")[:16].tolist() if p[id] >= 0.004 and teacher.token_bytes[id]]
        for id, mass in enumerate(p.tolist()):
            token = teacher.token_bytes[id]
            if id in teacher.end_ids:
                q[student.vocabulary.end_ids[0]] += mass
            elif token and id in likely:
                for further, share in enumerate(says([*prefix, id]).tolist()):
                    answer = int(first.of([(left, token + teacher.token_bytes[further])])[0])
                    if answer != NONE:
                        q[answer >> 1] += mass * share
            elif token and mass > 1e-7:
                answer = int(first.of([(left, token)])[0])
                if answer != NONE:
                    q[answer >> 1] += mass
        np.testing.assert_allclose(asked.q, q / q.sum(), atol=1e-5)
        seen += len(likely)
    assert seen > 10


def test_a_target_is_compared_over_its_tokens_and_all_others():
    q = np.array([0.5, 0.2, 0.2, 0.1])
    asked = expanded.Asked(None, None, 0, q)  # type: ignore[arg-type]
    target = SparseTarget(torch.tensor([[0, 1, 0]]), torch.tensor([[0.4, 0.3, 0.0]]), torch.tensor([0.3]), 1.0)
    tv, kl, same = compared(asked, target, 0)
    mixed = 0.999 * np.array([0.4, 0.3, 0.3]) + 0.001 * np.array([0.25, 0.25, 0.5])
    true = np.array([0.5, 0.2, 0.3])
    assert tv == pytest.approx(0.5 * np.abs(true - mixed).sum())
    assert kl == pytest.approx((true * np.log(true / mixed)).sum())
    assert same
    other = SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.6]]), torch.tensor([0.3]), 1.0)
    assert not compared(asked, other, 0)[2]
