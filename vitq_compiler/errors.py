"""What can go wrong, as types. Every message is one line: what, where, what to do."""


class VitqError(Exception):
    """Base of all errors a user can cause; the command line prints it as one line and exits with 2."""


class InternalError(Exception):
    """Base of all errors that are faults of the compiler; the command line asks for a report of it and exits with 1."""


class InstallError(VitqError):
    """A package that the compiler is built on is older than it needs."""


class ModelError(VitqError):
    """The input model is unfit: unreadable, already quantized, no transformer block."""


class RecipeError(VitqError):
    """A recipe, pass, pipeline or option is unknown or contradicts itself."""


class DataError(VitqError):
    """The calibration data is unfit: missing, undecodable, of the wrong name, shape or value."""


class OutputError(VitqError):
    """The output cannot be written."""


class TargetError(VitqError):
    """The target or its runtime cannot take the graph."""


class PassError(InternalError):
    """A pass raised what it does not expect.

    Attributes:
        name: the pass that failed.
        ran_before: the names of the passes that had finished.
    """

    def __init__(self, name: str, ran_before: tuple[str, ...], message: str) -> None:
        super().__init__(f"pass {name} failed after [{', '.join(ran_before)}]: {message}")
        self.name = name
        self.ran_before = ran_before


class InvariantError(InternalError):
    """A pass broke a promise: invalid structure, or a float-exact pass that changed the outputs."""
