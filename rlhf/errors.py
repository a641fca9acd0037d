"""Everything that rlhf raises on purpose.

RlhfError
├── UserError            the user's input; exit code 2, one message, no traceback
│   ├── RecipeError      a recipe or an override: which file, which key, what was expected
│   ├── DataError        a data file: which file, which line, what is wrong with it
│   └── MissingInput     something that a command needs is not there: what makes it
├── StageFailed          a stage ended without finishing; exit code 1
└── Interrupted          a stage was asked to stop, and has written a checkpoint; exit code 130
"""


class RlhfError(Exception):
    """Base of all: its text is a complete message for the user."""

    exit_code = 1


class UserError(RlhfError):
    """What the user gave can't be used."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or an override is wrong."""


class DataError(UserError):
    """A data file is wrong."""


class MissingInput(UserError):
    """Something that a command needs is not there."""


class StageFailed(RlhfError):
    """A stage ended without finishing."""


class Interrupted(RlhfError):
    """A stage was asked to stop, and has written a checkpoint."""

    exit_code = 130
