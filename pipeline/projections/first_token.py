import numpy as np

from pipeline.signals.first_tokens import Encode
from pipeline.signals.projection import REST, TokenMap, specials_to_specials
from pipeline.signals.vocabulary import Vocabulary


def first_token(teacher: Vocabulary, student: Vocabulary, encode: Encode) -> TokenMap:
    """A token whose bytes are a student token's goes there; another to the student token that its bytes begin with.

    That is the first token that the student's tokenizer makes of it, or for bytes that are no text of their own the longest
    one that is a prefix. What begins with no student token goes to the rest. Wrong where the student would have merged the
    token with what follows it (`1` of `123`).
    """
    student_id = np.array([student.id_of_bytes.get(token, REST) for token in teacher.token_bytes], dtype=np.int32)
    missing = [id for id in np.flatnonzero(student_id == REST).tolist() if teacher.token_bytes[id]]
    texts = {id: text for id in missing if (text := _as_text(teacher.token_bytes[id])) is not None}
    for id, encoded in zip(texts, encode(list(texts.values())), strict=True):
        first = encoded[0] if encoded else REST
        if first != REST and student.token_bytes[first] and teacher.token_bytes[id].startswith(student.token_bytes[first]):
            student_id[id] = first
    for id in missing:
        if student_id[id] == REST and (longest := student.longest_prefix(teacher.token_bytes[id])) is not None:
            student_id[id] = longest
    return TokenMap(specials_to_specials(teacher, student, student_id))


def _as_text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
