"""What a result is made from, as a readable identity, and its hash.

The identity of a stage's run is {stage, version, sections read, identities of the stages needed}. Where a section names a
file or a model, what the thing contains stands beside the name and only the content counts.
"""

import hashlib
import json
import math
from typing import Any

Identity = dict[str, Any]
IN_YAML = {"student_tokenizer.tokenizer": "student.model", "student_tokenizer.revision": "student.revision"}
"""Where the YAML has what a stage is told under another name."""


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, floats as float.hex(); NaN and foreign types are refused."""

    def plain(item: Any) -> Any:
        if item is None or isinstance(item, str | bool | int):
            return item
        if isinstance(item, float):
            if not math.isfinite(item):
                raise TypeError(f"{item} cannot be part of a fingerprint")
            return {"float": (item + 0.0).hex()}
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        if isinstance(item, dict) and item.keys() == {"float"}:
            raise TypeError("a mapping with the one key 'float' cannot be part of a fingerprint")
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            return {key: plain(part) for key, part in item.items()}
        raise TypeError(f"{type(item).__name__} cannot be part of a fingerprint")

    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint(identity: Identity) -> str:
    """16 hexadecimal digits over what shapes the result; the names of files and models are left out, their content counts."""
    hashed = {
        "stage": identity["stage"],
        "version": identity["version"],
        "sections": _content_only(identity["sections"]),
        "needs": {name: fingerprint(need) for name, need in identity["needs"].items()},
    }
    return hashlib.sha256(canonical(hashed).encode()).hexdigest()[:16]


def alike(one: Any, other: Any) -> bool:
    """Whether two sections say the same, wherever the files and models that they name lie."""
    return canonical(_content_only(one)) == canonical(_content_only(other))


def settings_digest(identity: Identity, without: tuple[str, ...]) -> str:
    """Over the stage, its version and its own settings; without those named (as section.key), and without what it is built on."""
    sections = {name: {key: part for key, part in _content_only(section).items() if f"{name}.{key}" not in without} for name, section in identity["sections"].items()}
    return hashlib.sha256(canonical({"stage": identity["stage"], "version": identity["version"], "sections": sections}).encode()).hexdigest()


def named(name: str, content: str) -> dict[str, str]:
    """How a file or model stands in an identity."""
    return {"named": name, "content": content}


def differing_keys(one: Identity, other: Identity) -> list[str]:
    """The dotted keys, such as teacher.quantization, in which two identities differ, their upstreams included."""
    here, there = _leaves(one), _leaves(other)
    keys = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    for name in one["needs"].keys() & other["needs"].keys():
        keys.update(differing_keys(one["needs"][name], other["needs"][name]))
    return sorted(keys)


def with_names(value: Any) -> Any:
    """The sections of an identity as the experiment had them: names of files and models without their content."""
    if _is_named(value):
        return value["named"]
    if isinstance(value, dict):
        return {key: with_names(part) for key, part in value.items()}
    return [with_names(part) for part in value] if isinstance(value, list) else value


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"named", "content"} and str(value["content"]).startswith(("sha256:", "hub:"))


def _content_only(value: Any) -> Any:
    if _is_named(value):
        return {"content": value["content"]}
    if isinstance(value, dict):
        return {key: _content_only(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_content_only(part) for part in value]
    return value


def _leaves(identity: Identity) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: Any, place: str) -> None:
        if _is_named(value):
            found[place] = value["content"]
        elif isinstance(value, dict) and value:
            for key, part in value.items():
                walk(part, f"{place}.{key}" if place else key)
        elif isinstance(value, list) and value:
            for i, part in enumerate(value):
                walk(part, f"{place}.{i}")
        else:
            found[place] = canonical(value)

    walk(identity["sections"], "")
    found = {IN_YAML.get(key, key): value for key, value in found.items()}
    found[f"{identity['stage']}.version"] = canonical(identity["version"])
    return found
