"""The YAML name, the file name and the function name are the same: a new loss is one new file, no list to keep in step."""

import ast
import difflib
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import options as types
from pipeline.errors import ConfigError

HERE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """What can be named: names("losses") gives the files of pipeline/losses/."""
    return sorted(file.stem for file in (HERE / kind).glob("*.py") if not file.stem.startswith("_"))


def find(kind: str, name: str) -> Callable[..., Any]:
    """The function of that name in the file of that name: find("losses", "forward_kl")."""
    check_name(kind, name)
    return getattr(importlib.import_module(f"pipeline.{kind}.{name}"), name)


def check_name(kind: str, name: str) -> None:
    if name not in names(kind):
        raise ConfigError(f"No '{name}' in pipeline/{kind}/; {nearest(name, names(kind))}")


@cache
def parameters(kind: str, name: str) -> tuple[tuple[str, ...], dict[str, bool]]:
    """Its positional parameters and its options (name -> must be given), read from the source: nothing is imported."""
    function = _signature(kind, name)
    positional = tuple(argument.arg for argument in function.args)
    options = {a.arg: d is None for a, d in zip(function.kwonlyargs, function.kw_defaults, strict=True)}
    return positional, options


@cache
def option_types(kind: str, name: str) -> dict[str, TypeAdapter[Any]]:
    """What its options are annotated with: plain types, and those of pipeline/options.py; anything where nothing is said."""
    found = {}
    for argument in _signature(kind, name).kwonlyargs:
        written = ast.unparse(argument.annotation) if argument.annotation else "Any"
        try:
            found[argument.arg] = TypeAdapter[Any](eval(written, dict(vars(types))))  # our own source
        except Exception as error:  # whatever an annotation can be that no value in a YAML could have
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"pipeline/{kind}/{name}.py: {argument.arg} is annotated with {written}, which is no type of an option ({why}). See pipeline/options.py.") from None
    return found


def _signature(kind: str, name: str) -> ast.arguments:
    check_name(kind, name)
    tree = ast.parse((HERE / kind / f"{name}.py").read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name).args


def nearest(wrong: str, right: list[str]) -> str:
    """The end of an error sentence: the nearest right name, or all of them."""
    close = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(right)}."
