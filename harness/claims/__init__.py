"""Claims: figures that somebody published, put to the test on the machine at hand.

A claim is one file of `conf/claims/`: what was published, in our words; the recipes or plans that test it; and figures,
each a formula over their quantities with the range that was claimed. `dyno claims run` runs what is not recorded yet,
every recipe once however many claims share it, and judges; see `verdict.py` for the rule.
"""

from dyno.claims.claim import Claim, load
from dyno.claims.judge import from_records

__all__ = ["Claim", "from_records", "load"]
