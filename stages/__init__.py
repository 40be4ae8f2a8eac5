"""The stages, in the order in which they are done. This table is all that `pipeline --help` and `status` load of them."""

from pipeline.running.stage import Stage

STAGES = (
    Stage(
        name="prepare-data",
        module="stages.prepare_data",
        version=2,
        reads=("data",),
        help="Datasets to clean records with segments, specialty and split.",
    ),
    Stage(
        name="cache-teacher",
        module="stages.cache_teacher",
        version=6,
        reads=("data", "teacher", "targets"),
        needs=("prepare-data",),
        several=True,
        pieces="pipeline.cache.plan",
        not_in_pieces=("data.train", "data.heldout", "data.records_per_shard"),
        help="Run the teacher once and keep what it says.",
    ),
    Stage(
        name="fit-projection",
        module="stages.fit_projection",
        version=3,
        reads=("student_tokenizer", "projection"),
        needs=("cache-teacher",),
        on_the_way=True,
        several=True,
        help="Map the teacher's vocabulary to the student's.",
    ),
    Stage(
        name="train-student",
        module="stages.train_student",
        version=4,
        reads=("student", "training"),
        needs=("cache-teacher", "fit-projection"),
        parallel=True,
        help="Train a student from the cache.",
    ),
    Stage(
        name="train-control",
        module="stages.train_student",
        version=4,
        same_as="train-student",
        reads=("student", "training"),
        needs=("cache-teacher", "fit-projection"),
        on_the_way=True,
        parallel=True,
        help="The same student, steps and data without the teacher (SFT only).",
    ),
    Stage(
        name="evaluate",
        module="stages.evaluate",
        version=3,
        reads=("student", "evaluation"),
        needs=("cache-teacher", "fit-projection", "train-student", "train-control"),
        help="Teacher, student before training, control and distilled student on the held-out split.",
    ),
)
