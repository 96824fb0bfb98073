"""Fixtures that several files use."""

from runner_bench import composed, recipe, subreaper, worker  # noqa: F401
