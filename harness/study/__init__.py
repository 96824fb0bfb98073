"""Studies: an Optuna search over recipes that survives failures, interruptions and kill -9."""

from dyno.study.tune import tune

__all__ = ["tune"]
