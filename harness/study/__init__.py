"""Studies: an Optuna search over recipes that any end, kill -9 included, leaves resumable."""

from dyno.study.main import tune

__all__ = ["tune"]
