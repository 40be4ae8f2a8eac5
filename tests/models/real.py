"""Real models, where there are any: the folders gemma-3-270m and smollm2-135m-instruct in $PIPELINE_TEST_MODELS."""

import os
from functools import cache
from pathlib import Path

import pytest

from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer

GEMMA, SMOLLM = "gemma-3-270m", "smollm2-135m-instruct"


def folder(name: str) -> Path:
    place = os.environ.get("PIPELINE_TEST_MODELS")
    if not place:
        pytest.skip(f"PIPELINE_TEST_MODELS is not set: give a folder with {GEMMA} and {SMOLLM}")
    if not (Path(place) / name / "config.json").is_file():
        pytest.skip(f"PIPELINE_TEST_MODELS has no {name}")
    return Path(place) / name


def tokenizer(name: str, template: str = "plain") -> RecordTokenizer:
    return _loaded(str(folder(name)), template)


@cache
def _loaded(source: str, template: str) -> RecordTokenizer:
    return load_tokenizer(source, None, template, source)
