"""Fixtures that several files use, and a home of the tests' own: no calibration or ceiling of the user's is read."""

import os
import shutil
import tempfile

from runner_bench import composed, recipe, subreaper, worker  # noqa: F401

HOME = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have their controller's
    HOME = os.environ["DYNO_HOME"] = tempfile.mkdtemp(prefix="dyno-tests-")


def pytest_unconfigure() -> None:
    if HOME:
        shutil.rmtree(HOME, ignore_errors=True)
