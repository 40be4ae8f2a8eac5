"""The error tree. Each error that a user can cause says what is wrong with which thing, and the way out.

PipelineError            exit status 1: the work failed
├── InputError           exit status 2: the command, the YAML, a file, a record or a model is wrong
│   ├── ConfigError      the YAML or --set
│   ├── NotFinished      a stage that this one builds on has no finished folder
│   └── Mismatch         two things that do not belong together (a cache and another teacher's vocabulary)
├── DamageError          exit status 1: a file is not what was written
├── Disagreement         exit status 1: the same work gave two results
├── NumericsError        exit status 1: NaN or infinity where a number must be
└── Stopped              exit status 75: SIGTERM; what was finished is kept
"""


class PipelineError(Exception):
    exit_status = 1


class InputError(PipelineError):
    exit_status = 2


class ConfigError(InputError):
    pass


class NotFinished(InputError):
    pass


class Mismatch(InputError):
    pass


class DamageError(PipelineError):
    pass


class NumericsError(PipelineError):
    pass


class Disagreement(PipelineError):
    pass


class Stopped(PipelineError):
    exit_status = 75

    def __init__(self) -> None:
        super().__init__("Stopped by SIGTERM. What was finished is kept; the same command again goes on from there.")
