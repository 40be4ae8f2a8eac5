"""What a scorer says of the cached teacher, against what `inspect` shows of the cache."""

import numpy as np
import pytest
import torch

from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Cache
from pipeline.models.heads import row_logits
from pipeline.models.loading import load_student
from pipeline.models.scoring import BINS, CachedTeacher, StudentScorer, _certainty
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.inspection import record
from pipeline.signals.projection import at_temperature
from tests.conftest import Place


def test_the_cached_teachers_certainty_is_that_of_its_strongest_tokens(done: Place):
    finished = done.finished("cache-teacher")
    examples = [example for example in Cache(finished.file, ("entropy",)).examples("heldout") if not example.record.choice_of]
    scores = CachedTeacher(examples).scores([example.record for example in examples])
    assert scores
    for example, score in zip(examples, scores, strict=True):
        wanted = np.zeros((BINS, 4))
        for row in record(finished.path, example.record.id)["positions"]:
            probability = float(np.exp(np.float64(row["kept_logprobs"][0])))
            follows = row["kept_ids"][0] == row["realised_id"]
            wanted[min(int(probability * BINS), BINS - 1)] += 1, probability, follows, (probability - follows) ** 2
        assert score.certainty is not None
        np.testing.assert_allclose(score.certainty, wanted, atol=1e-5)
        assert score.certainty[:, 0].sum() == score.tokens


def test_each_position_is_in_the_bin_of_its_probability_and_of_its_record():
    probability = np.array([0.0, 0.0667, 0.9999, 1.0, 1.0000001])
    found = _certainty(probability, np.array([True, False, True, True, False]), np.array([0, 0, 1, 1, 1]), 3)
    assert found.shape == (3, BINS, 4)
    assert found[0, 0].tolist() == [1, 0, 1, 1]
    assert found[0, 1].tolist() == [1, 0.0667, 0, 0.0667**2]
    assert found[1, BINS - 1].tolist() == pytest.approx([3, probability[2:].sum(), 2, 1.0], rel=1e-3)
    assert found[:, :, :3].sum((0, 1)) == pytest.approx([5, probability.sum(), 3])


def test_a_student_beside_the_teacher_is_what_a_dense_loop_gives(done: Place):
    cache = Cache(done.finished("cache-teacher").file, ("entropy",))
    examples = list(cache.examples("heldout"))
    source = str(done.path / "tiny" / "student")
    tokenizer = load_tokenizer(source, None, "plain", "student")
    view = StudentView(cache, done.finished("fit-projection").file, tokenizer.render, tokenizer.digest())
    model = load_student(source, None, [0, 2], torch.device("cpu")).eval()
    records = [example.record for example in examples if not example.record.choice_of]
    scores = StudentScorer(row_logits(model, "student", len(tokenizer.vocabulary)), tokenizer.render, view, examples, 3).scores(records)
    entropies = np.sort(np.concatenate([example.targets.entropy for example in examples if not example.record.choice_of]))
    edges = [np.quantile(entropies.astype(np.float64), n / 10) for n in range(1, 10)]
    decile_of, compared_positions = set(), 0
    by_record = {example.record.id: example for example in examples}
    for one, score in zip(records, scores, strict=True):
        example = by_record[one.id]
        tokens = tokenizer.render(one)
        word = view.projected(example, tokens, inside=False)
        with torch.inference_mode():
            logprobs = model(torch.tensor(tokens.ids.astype(np.int64))[None]).logits[0, :, : len(tokenizer.vocabulary)].double().log_softmax(-1).numpy()
        by_entropy, by_position, certainty = np.zeros((10, 5)), np.zeros((16, 5)), np.zeros(5)
        target = at_temperature([word], cache.temperatures, 1.0)
        for n, position in enumerate(word.position):
            mass: dict[int, float] = {}
            for id, probability in zip(target.ids[n].tolist(), target.probs[n].tolist(), strict=True):
                mass[id] = mass.get(id, 0.0) + probability
            own = np.exp(logprobs[position])
            rest, own_rest = float(target.rest[n]), 1 - sum(own[id] for id in mass)
            kl = sum(p * (np.log(p) - logprobs[position][id]) for id, p in mass.items() if p > 0) + (rest * np.log(rest / own_rest) if rest > 0 else 0.0)
            variation = (sum(abs(p - own[id]) for id, p in mass.items()) + abs(rest - own_rest)) / 2
            theirs = sorted((id for id in mass if mass[id] > 0), key=lambda id: -mass[id])[:5]
            ours = np.argsort(-own)[:5]
            figures = 1, kl, variation, theirs[0] == ours[0], len(set(theirs) & set(ours.tolist())) / len(theirs)
            decile = sum(example.targets.entropy[word.row[n]] >= edge for edge in edges)
            place = int(np.searchsorted(tokens.answer_positions(), position))
            by_entropy[decile] += figures
            by_position[int(np.log2(place + 1))] += figures
            x, y = mass[theirs[0]], own.max()
            certainty += x, y, x * x, y * y, x * y
            decile_of.add(decile)
            compared_positions += 1
        assert score.compared is not None
        np.testing.assert_allclose(score.compared.by_entropy, by_entropy, atol=2e-4)
        np.testing.assert_allclose(score.compared.by_position, by_position, atol=2e-4)
        np.testing.assert_allclose(score.compared.certainty, certainty, atol=2e-4)
    assert compared_positions > 50
    assert len(decile_of) == 10


def test_the_teacher_beside_itself_differs_in_nothing(done: Place):
    examples = [example for example in Cache(done.finished("cache-teacher").file, ("entropy",)).examples("heldout") if not example.record.choice_of]
    scores = CachedTeacher(examples).scores([example.record for example in examples])
    assert scores
    found = np.sum([score.compared.by_entropy for score in scores if score.compared], 0)
    assert found[:, 0].sum() == sum(len(example.targets.position) for example in examples)
    assert np.ptp(found[:, 0]) <= 2  # deciles
    np.testing.assert_array_equal(found[:, 1:3], 0)
    np.testing.assert_array_equal(found[:, 3:], found[:, [0, 0]])
