"""Real models, where there are any: in $PIPELINE_TEST_MODELS the folders gemma-3-270m and smollm2-135m-instruct, and tokenizers alone in tokenizers/."""

import os
from functools import cache
from pathlib import Path

import pytest

from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer

GEMMA, SMOLLM = "gemma-3-270m", "smollm2-135m-instruct"
LLAMA3, QWEN3 = "tokenizers/llama3", "tokenizers/qwen3"


def folder(name: str, file: str = "config.json") -> Path:
    place = os.environ.get("PIPELINE_TEST_MODELS")
    if not place:
        pytest.skip(f"PIPELINE_TEST_MODELS is not set: give a folder with {GEMMA} and {SMOLLM}, and with {LLAMA3} and {QWEN3} for more tokenizers")
    if not (Path(place) / name / file).is_file():
        pytest.skip(f"PIPELINE_TEST_MODELS has no {name}/{file}")
    return Path(place) / name


def tokenizer(name: str, template: str = "plain") -> RecordTokenizer:
    return _loaded(str(folder(name, "tokenizer.json")), template)


@cache
def _loaded(source: str, template: str) -> RecordTokenizer:
    return load_tokenizer(source, None, template, source)
