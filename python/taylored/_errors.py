"""The errors that are part of the interface."""


class TraceError(RuntimeError):
    """The model could not be traced, or does not run with fewer channels. Names the line of the model at fault."""


class PlanError(ValueError):
    """A plan cannot be made as asked, or does not fit the model it is to be applied to."""


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or does not belong to the model."""


class ExportError(RuntimeError):
    """The model cannot be exported as asked, or what was exported gives another answer."""


class VerificationError(RuntimeError):
    """The model as a plan would leave it computes something else than the model with the plan's units zeroed; nothing was cut.

    difference: the largest relative difference of the outputs; layer: the first layer at which they part, None if it is none."""

    def __init__(self, message: str, difference: float, layer: str | None):
        super().__init__(message)
        self.difference, self.layer = difference, layer
