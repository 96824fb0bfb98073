"""What can go wrong, as types: a user's mistake, and the typed failures of a run."""

from __future__ import annotations

STATUSES = ("ok", "out_of_memory", "unsupported", "timeout", "non_finite", "crashed", "contaminated")


class UserError(ValueError):
    """A mistake in the input: one line that says what, where, and what would be right. Exit code 2."""


class RunFailure(Exception):
    """A run that ends with a typed reason; `status` is one of STATUSES."""

    status = "crashed"


class Unsupported(RunFailure):
    """This combination cannot run here, with the reason in the user's words."""

    status = "unsupported"


class Conflict(Unsupported):
    """Two techniques want to own the same part of a run."""


class NonFinite(RunFailure):
    """The loss or the logits stopped being finite."""

    status = "non_finite"
