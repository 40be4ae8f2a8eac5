import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pipeline.benchmarks._records import row
from pipeline.benchmarks._scores import Live
from pipeline.errors import InputError
from pipeline.options import Positive
from pipeline.signals.records import Record

try:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU
except ImportError:
    raise InputError("text_quality needs rouge-score and sacrebleu. Install them: pip install 'distillation-pipeline[eval]'") from None

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_quality(live: Live, heldout: list[Record], *, records: Positive | None = None, max_tokens: Positive = 128) -> dict[str, Any]:
    """What the model writes beside the answers that are there: ROUGE-1, -2 and -L (F1, mean over the records, with stems; Lin 2004),
    BLEU and BLEU-1 (of all answers together, 0 to 100; Papineni et al. 2002, Post 2018).

    Of the first so many held-out records that have no options (of all where all have); always the most likely token next, until the
    answer's end or `max_tokens` of the model's own. rouge-score knows the letters a to z and digits alone.
    """
    asked = ([record for record in heldout if not record.options] or heldout)[:records]
    references = [record.segments[-1].text for record in asked]
    if asked and not any(references):
        raise InputError("text_quality needs the text of the held-out records, and this cache has none (`targets.text: omit`). Leave text_quality out, or make the cache with `text: keep`.")
    found = live.generations(asked, max_tokens) if asked else None
    answered = [(record, reference, answer) for record, reference, answer in zip(asked, references, found or [], strict=True) if answer] if found else []
    if not answered:
        return dict.fromkeys((*ROUGE, "bleu", "bleu1")) | {"text_quality": {"answers": 0}}
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [{name: score.fmeasure for name, score in scorer.score(reference, text).items()} for _, reference, (text, _) in answered]
    texts, those = [text for _, _, (text, _) in answered], [reference for _, reference, _ in answered]
    bleu, signature = _bleu(texts, those, 4)
    bleu1, _ = _bleu(texts, those, 1)
    return {
        **{name: sum(score[name] for score in scores) / len(scores) for name in ROUGE},
        "bleu": bleu,
        "bleu1": bleu1,
        "text_quality": {
            "answers": len(answered),
            "ended": sum(ended for _, _, (_, ended) in answered) / len(answered),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            "max_tokens": max_tokens,
            "prompts": f"sha256:{hashlib.sha256(json.dumps([record.question_digest() for record, _, _ in answered]).encode()).hexdigest()}",
            "bleu_signature": signature,
        },
        "records": [row(record, generated=text, ended=ended, **score) for (record, _, (text, ended)), score in zip(answered, scores, strict=True)],
    }


def _bleu(texts: Sequence[str], references: Sequence[str], order: int) -> tuple[float, str]:
    metric = BLEU(max_ngram_order=order)
    return float(metric.corpus_score(texts, [references]).score), str(metric.get_signature())
