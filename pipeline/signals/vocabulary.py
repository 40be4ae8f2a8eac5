"""What bytes each token stands for, read from tokenizer.json alone. Never compare tokens by their vocabulary strings."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.errors import InputError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer."""

    token_bytes: list[bytes]  # [V] what a token adds to the text; b"" for special tokens and unused ids
    special: np.ndarray  # bool [V]
    end_ids: tuple[int, ...] = ()
    """The special tokens that can end an answer (end of turn, end of text); the first is the one its template uses."""
    fallback_ids: frozenset[int] = frozenset()
    """Byte-fallback tokens such as <0x0A>."""

    def __len__(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """The token of these bytes; of several the lowest id that is no byte-fallback token, which encoders prefer."""
        found: dict[bytes, int] = {}
        for id in range(len(self) - 1, -1, -1):
            if self.token_bytes[id] and not (id in self.fallback_ids and self.token_bytes[id] in found):
                found[self.token_bytes[id]] = id
        return found

    def longest_prefix(self, data: bytes) -> int | None:
        """The longest token that the bytes begin with."""
        return next((self.id_of_bytes[data[:n]] for n in range(min(len(data), int(self.lengths.max())), 0, -1) if data[:n] in self.id_of_bytes), None)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [V]: bytes per token."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int32)

    def digest(self) -> str:
        """SHA-256 over every token's bytes and role."""
        digest = hashlib.sha256()
        for token, special in zip(self.token_bytes, self.special.tolist(), strict=True):
            digest.update(len(token).to_bytes(4, "big") + token + bytes([special]))
        return digest.hexdigest()


def vocabulary_of(tokenizer: dict[str, Any], end_ids: tuple[int, ...] = ()) -> Vocabulary:
    """From the parsed tokenizer.json. InputError if its tokens' bytes cannot be known."""
    model = tokenizer["model"]
    entries = model["vocab"]
    ids = {token: id for id, (token, _) in enumerate(entries)} if isinstance(entries, list) else dict(entries)
    style = _style(tokenizer)
    added = tokenizer.get("added_tokens", [])
    size = max([*ids.values(), *(token["id"] for token in added)], default=-1) + 1
    token_bytes = [b""] * size
    fallback = set()
    for token, id in ids.items():
        if style == "byte-level":
            token_bytes[id] = _from_byte_level(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            token_bytes[id] = bytes([int(token[3:5], 16)])
            fallback.add(id)
        else:
            token_bytes[id] = token.replace("▁", " ").encode()
    special = np.zeros(size, dtype=bool)
    for token in added:
        special[token["id"]] = token["special"]
        # the text of an added token is matched before the byte-level alphabet is applied
        text = token["content"] if style == "byte-level" else token["content"].replace("▁", " ")
        token_bytes[token["id"]] = b"" if token["special"] else text.encode()
    return Vocabulary(token_bytes, special, end_ids, frozenset(fallback))


def same_vocabulary(one: Vocabulary, other: Vocabulary) -> bool:
    """Every id stands for the same bytes and role on both sides (one may have more unused rows at the end)."""
    n = min(len(one), len(other))
    longer = one if len(one) > n else other
    return one.token_bytes[:n] == other.token_bytes[:n] and bool((one.special[:n] == other.special[:n]).all()) and not any(longer.token_bytes[n:])


CLASSES = (
    "end",
    "other special",
    "space",
    "newline",
    "other control",
    "tab",
    "a-z",
    "A-Z",
    "0-9",
    "quote",
    "sentence punctuation",
    "other ASCII",
    "2-byte lead",
    "3- or 4-byte lead",
    "continuation",
    "no UTF-8",
)
"""Of tokens by their first byte."""
BOUNDARY = ("end", "other special", "space", "newline", "tab")
"""Those of which no token goes on with a word."""


def first_byte_classes(vocabulary: Vocabulary) -> np.ndarray:
    """int64 [V]: which of CLASSES each token begins with."""
    of_byte = np.full(256, CLASSES.index("other ASCII"), dtype=np.int64)
    of_byte[:0x20] = CLASSES.index("other control")
    of_byte[0x7F] = CLASSES.index("other control")
    of_byte[0x80:0xC0] = CLASSES.index("continuation")
    of_byte[0xC0:] = CLASSES.index("no UTF-8")
    of_byte[0xC2:0xE0] = CLASSES.index("2-byte lead")
    of_byte[0xE0:0xF5] = CLASSES.index("3- or 4-byte lead")
    for name, letters in (("space", b" "), ("newline", b"\n"), ("tab", b"\t"), ("quote", b"\"'`"), ("sentence punctuation", b".,;:!?")):
        of_byte[list(letters)] = CLASSES.index(name)
    of_byte[ord("a") : ord("z") + 1] = CLASSES.index("a-z")
    of_byte[ord("A") : ord("Z") + 1] = CLASSES.index("A-Z")
    of_byte[ord("0") : ord("9") + 1] = CLASSES.index("0-9")
    classes = np.array([of_byte[token[0]] if token else CLASSES.index("other special") for token in vocabulary.token_bytes], dtype=np.int64)
    classes[list(vocabulary.end_ids)] = CLASSES.index("end")
    return classes


def begins_anew(vocabulary: Vocabulary) -> np.ndarray:
    """bool [V]: the tokens of the classes BOUNDARY."""
    return np.isin(first_byte_classes(vocabulary), [CLASSES.index(name) for name in BOUNDARY])


def _style(tokenizer: dict[str, Any]) -> str:
    kinds = set(_types(tokenizer.get("decoder"))) | set(_types(tokenizer.get("pre_tokenizer")))
    if "ByteLevel" in kinds:
        return "byte-level"
    if kinds & {"ByteFallback", "Metaspace"}:
        return "sentencepiece"
    raise InputError(
        "This tokenizer is neither byte-level (GPT-2, Llama 3, Qwen) nor SentencePiece-like (Gemma, Llama 2, Mistral), so the bytes of its tokens are not known. Choose a model with such a tokenizer."
    )


def _types(part: Any) -> list[str]:
    if isinstance(part, dict):
        inner = [kind for value in part.values() for kind in _types(value)]
        return [str(part["type"]), *inner] if "type" in part else inner
    return [kind for value in part for kind in _types(value)] if isinstance(part, list) else []


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: the printable bytes for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[letter] for letter in token)
    except KeyError:
        return token.encode()
