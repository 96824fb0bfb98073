"""Where what this machine keeps for all projects lies: locks, measured ceilings, converted tokenizers."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$DYNO_HOME, else dyno in $XDG_CACHE_HOME or ~/.cache. Not made here: whoever writes makes its folder."""
    stated = os.environ.get("DYNO_HOME")
    return Path(stated) if stated else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dyno"
