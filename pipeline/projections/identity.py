import numpy as np

from pipeline.errors import Mismatch
from pipeline.signals.projection import REST, TokenMap
from pipeline.signals.vocabulary import Vocabulary, same_vocabulary


def identity(teacher: Vocabulary, student: Vocabulary) -> TokenMap:
    """Every token is itself. Mismatch unless both vocabularies are the same (unused rows at the end may differ)."""
    if not same_vocabulary(teacher, student):
        raise Mismatch("projection.method identity needs equal vocabularies, and the teacher's and the student's differ. Choose `contextual`.")
    student_id = np.arange(len(teacher), dtype=np.int32)
    student_id[len(student) :] = REST  # the student's head may have no such rows
    if teacher.end_ids and student.end_ids and teacher.end_ids[0] != student.end_ids[0]:
        # a base and an instruct model of one family end their answers differently
        student_id[teacher.end_ids[0]] = student.end_ids[0]
    return TokenMap(student_id)
