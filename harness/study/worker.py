"""A worker process of a study, on the one GPU that it can see: `python -m dyno.study.worker`, request on stdin."""

from __future__ import annotations

import json
import sys
import time

from dyno import processes
from dyno.errors import UserError
from dyno.study.loop import Loop
from dyno.study.session import Session
from dyno.study.settings import read
from dyno.study.workers import INTERRUPTED


def emit(kind: str, text: str) -> None:
    print(json.dumps({kind: text}), flush=True)


def main() -> int:
    processes.die_with_parent()
    request = json.load(sys.stdin)
    deadline = None if request["left_s"] is None else time.monotonic() + request["left_s"]
    try:
        session = Session(read(request["command"], request["plugins"]), request["index"])
        try:
            loop = Loop(
                session, lambda t: emit("progress", t), lambda t: emit("say", t), deadline, request["workers"]
            )  # fmt: skip
            emit("end", loop.run())
        finally:
            session.close()
    except UserError as error:
        emit("end", f"error: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
