import numpy as np

from pipeline.signals.projection import REST, TokenMap, specials_to_specials
from pipeline.signals.vocabulary import Vocabulary


def exact_bytes(teacher: Vocabulary, student: Vocabulary) -> TokenMap:
    """A token whose bytes are a student token's goes there, every other to the rest."""
    student_id = np.array([student.id_of_bytes.get(token, REST) for token in teacher.token_bytes], dtype=np.int32)
    return TokenMap(specials_to_specials(teacher, student, student_id))
