"""A model that answers anything: how likely a continuation is, as the harness asks it, and what it writes."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.errors import InputError, NumericsError
from pipeline.models.heads import RowLogits, row_logits
from pipeline.models.tokenizers import NotKept, RecordTokenizer
from pipeline.signals.records import ANSWER, Record, Segment

AT_ONCE = 16
"""Batches that are handed to the model together: within them like lengths come together."""
Remember = Callable[[list[str], Callable[[list[int]], list[Any]], int], list[Any]]
"""Keys, what asks for the values of some of them (by place), how many at a time -> all values."""


def likelihood_key(context: str, continuation: str) -> str:
    return hashlib.sha256(json.dumps(["likelihood", context, continuation]).encode()).hexdigest()[:32]


def generation_key(record: Record, max_tokens: int) -> str:
    return hashlib.sha256(json.dumps(["generation", record.digest(), max_tokens]).encode()).hexdigest()[:32]


def remember_nothing(keys: list[str], ask: Callable[[list[int]], list[Any]], at_once: int) -> list[Any]:
    return list(chain.from_iterable(ask(list(range(begin, min(begin + at_once, len(keys))))) for begin in range(0, len(keys), at_once)))


class LiveModel:
    """A causal LM with its tokenizer and template. remember: what keeps answers, so that none is asked for twice."""

    def __init__(self, model: PreTrainedModel, tokenizer: RecordTokenizer, name: str, batch_records: int, remember: Remember = remember_nothing) -> None:
        self._model, self._tokenizer, self._name, self._batch, self._remember = model, tokenizer, name, batch_records, remember
        self._device = next(model.parameters()).device
        self._harness: Any = None
        self.cut = 0
        """How many contexts were longer than the model reads, so that the harness cut off their beginning."""

    def loglikelihoods(self, asked: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """As the harness's own model for transformers reads them, in batches of like length."""
        found = self._remember([likelihood_key(*each) for each in asked], lambda places: self._likelihoods([asked[place] for place in places]), self._batch * AT_ONCE)
        self.cut += _cut(asked, found)
        return [(float(logprob), bool(greedy)) for logprob, greedy, _ in found]

    def generations(self, records: Sequence[Record], max_tokens: int) -> Sequence[tuple[str, bool] | None]:
        """Always the most likely token, from the question as the template renders it, in batches of like length.

        None for a record whose bytes the tokenizer does not keep.
        """
        found = [self._prompt(record) for record in records]
        kept = [place for place, prompt in enumerate(found) if prompt is not None]
        answers: list[tuple[str, bool] | None] = [None] * len(records)
        for place, answer in zip(kept, self._answers([records[place] for place in kept], [prompt for prompt in found if prompt is not None], max_tokens), strict=True):
            answers[place] = answer
        return answers

    def _prompt(self, record: Record) -> list[int] | None:
        try:
            return prompt_of(self._tokenizer, record)
        except NotKept:
            return None

    def _answers(self, records: list[Record], prompts: list[list[int]], max_tokens: int) -> list[tuple[str, bool]]:
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for record, prompt in zip(records, prompts, strict=True):
            if room and len(prompt) + max_tokens > room:
                raise InputError(
                    f"The question of record {record.id} has {len(prompt)} tokens, and with {max_tokens} new ones there are more than the {room} that {self._name} reads. "
                    "Set a lower `max_tokens` for text_quality, or fewer `records`."
                )
        order = sorted(range(len(records)), key=lambda place: len(prompts[place]))
        keys = [generation_key(records[place], max_tokens) for place in order]
        found = self._remember(keys, lambda places: self._generated([prompts[order[place]] for place in places], max_tokens), self._batch)
        answers: list[tuple[str, bool]] = [("", False)] * len(records)
        for place, (text, ended) in zip(order, found, strict=True):
            answers[place] = (str(text), bool(ended))
        return answers

    def _likelihoods(self, asked: list[tuple[str, str]]) -> list[tuple[float, bool, bool]]:
        if self._harness is None:
            self._harness = _harness_model(self._model, self._tokenizer, self._name, self._batch)
        with torch.inference_mode():
            found = self._harness.loglikelihood([_Asked(each) for each in asked], disable_tqdm=True)
        for (context, continuation), (logprob, _) in zip(asked, found, strict=True):
            if not np.isfinite(logprob):
                raise NumericsError(
                    f"{self._name} gives {continuation!r} after {context[-80:]!r} a log-probability that is not finite. Train it with a lower learning rate, or load it with another dtype."
                )
        cut = [len(self._harness.tok_encode(context + continuation)) > self._harness.max_length + 1 for context, continuation in asked]
        return [(float(logprob), bool(greedy), long) for (logprob, greedy), long in zip(found, cut, strict=True)]

    def _generated(self, prompts: list[list[int]], max_tokens: int) -> list[tuple[str, bool]]:
        vocabulary = self._tokenizer.vocabulary
        ends = list(vocabulary.end_ids)
        width = max(map(len, prompts))
        ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device)
        answers = greedy(self._model, ids, mask, max_tokens, ends, len(vocabulary))[:, width:].tolist()
        return [_answer(answer, set(ends), vocabulary.token_bytes) for answer in answers]


def _cut(asked: Sequence[tuple[str, str]], answers: Sequence[Any]) -> int:
    """Contexts, whatever the number of their options."""
    return len({context for (context, _), (_, _, cut) in zip(asked, answers, strict=True) if cut})


class Remembered:
    """A model that was asked elsewhere; None: nobody has asked it."""

    def __init__(self, answers: Mapping[str, Any] | None, name: str) -> None:
        self._answers, self._name = answers, name
        self.cut = 0

    def loglikelihoods(self, asked: Sequence[tuple[str, str]]) -> list[tuple[float, bool]] | None:
        if self._answers is None:
            return None
        found = [self._answers.get(likelihood_key(*each)) for each in asked]
        if missing := found.count(None):
            raise InputError(
                f"{self._name} was not asked {missing} of {len(asked)} questions, such as {asked[found.index(None)][0][-80:]!r}: a benchmark has others than it had then "
                "(one from the hub, or of another version of lm-eval). Remove the folder of evaluate-teacher and run that stage again, or set evaluation.ask_teacher to false."
            )
        self.cut += _cut(asked, [answer for answer in found if answer])
        return [(float(answer[0]), bool(answer[1])) for answer in found if answer]

    def generations(self, records: Sequence[Record], max_tokens: int) -> Sequence[tuple[str, bool] | None] | None:
        if self._answers is None:
            return None
        keys = [generation_key(record, max_tokens) for record in records]
        if missing := sum(key not in self._answers for key in keys):
            raise InputError(
                f"{self._name} was not asked to write {missing} of {len(keys)} answers. Its folder of evaluate-teacher is of another evaluation: "
                "run `pipeline evaluate-teacher` with this one, or set evaluation.ask_teacher to false."
            )
        found = [self._answers[key] for key in keys]
        return [(str(answer[0]), bool(answer[1])) for answer in found]


def greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, ends: list[int], vocabulary_size: int, least: int | None = None) -> torch.Tensor:
    """int64 [B, T + new]: the most likely token next, and nothing of what the model's own generation settings say. least: do not end before."""
    rows = model.get_output_embeddings().weight.shape[0]
    beyond = list(range(vocabulary_size, rows)) or None  # rows of the head that are no tokens
    plain = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=new_tokens, min_new_tokens=least, eos_token_id=ends, pad_token_id=ends[0], suppress_tokens=beyond)
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, generation_config=plain)  # type: ignore[operator]
    finally:
        model.generation_config = before


def prompt_of(tokenizer: RecordTokenizer, record: Record) -> list[int]:
    """The ids before the last answer, as they are before an answer that begins with a letter: another beginning (a digit, a line break)
    may be one token with the template's end, and the prompt would tell it."""
    tokens = tokenizer.render(replace(record, segments=(*record.segments[:-1], Segment("assistant", "A"))))
    inside = tokens.kind >= ANSWER
    begins = np.flatnonzero(inside[1:] & ~inside[:-1])
    return [int(id) for id in tokens.ids[: begins[-1] + 1]]


def _answer(ids: list[int], ends: set[int], token_bytes: Sequence[bytes]) -> tuple[str, bool]:
    """The text before the first end, and whether there is one."""
    end = next((place for place, id in enumerate(ids) if id in ends), None)
    return b"".join(token_bytes[id] for id in ids[:end]).decode("utf-8", "replace").strip(), end is not None


class _Asked:
    """What the harness's model wants of a request."""

    def __init__(self, args: tuple[str, str]) -> None:
        self.args = args


def _harness_model(model: PreTrainedModel, tokenizer: RecordTokenizer, name: str, batch: int) -> Any:
    """The harness's own model for transformers, which tokenizes and cuts; of the logits it makes only the continuations'."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise InputError("Benchmarks of the harness need lm-eval. Install it: pip install 'distillation-pipeline[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    head = row_logits(model, name, model.get_output_embeddings().weight.shape[0])

    class Rows(HFLM):
        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
            return continuations(head, [(context, continuation) for _, context, continuation in requests], self.max_length, batch)

    return Rows(pretrained=model, tokenizer=tokenizer.tokenizer, backend="causal", batch_size=batch)


def continuations(head: RowLogits, asked: list[tuple[list[int], list[int]]], most: int, batch: int) -> list[tuple[float, bool]]:
    """Of each (context, continuation), token ids, the continuation's log-probability (float64) and whether each of its tokens is the most likely.

    At most `most` tokens are read, the last ones. What reads the same is read once: options of one token share a pass. InputError if
    that has no room for a continuation.
    """
    if any(not context or not continuation for context, continuation in asked):
        raise InputError("A question of a benchmark, or one of its options, has no tokens in this model's tokenizer (nothing but spaces?). Leave that benchmark out.")
    if asked and (longest := max(len(continuation) for _, continuation in asked)) > most:
        raise InputError(f"An option has {longest} tokens, and the model reads {most}. Leave that benchmark out.")
    readers: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(asked):
        readers.setdefault(tuple((context + continuation)[-most - 1 : -1]), []).append(place)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    texts = sorted(readers, key=len)
    device = next(head.parameters()).device
    for begin in range(0, len(texts), batch):
        here = texts[begin : begin + batch]
        width = max(map(len, here))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in here], device=device)
        with torch.inference_mode():
            hidden = head.hidden(ids)
            for row, text in enumerate(here):
                longest = max(len(asked[place][1]) for place in readers[text])
                end = row * width + len(text)
                logits = head.head(hidden[end - longest : end]).double()
                logprobs, likeliest = logits.log_softmax(-1), logits.argmax(-1)
                for place in readers[text]:
                    tokens = torch.tensor(asked[place][1], device=device)
                    last = logprobs[-len(tokens) :]
                    found[place] = float(last.gather(1, tokens[:, None]).sum()), bool((likeliest[-len(tokens) :] == tokens).all())
    return found
