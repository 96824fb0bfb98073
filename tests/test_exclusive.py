"""One measurement at a time on a device, and a run of several devices holds them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from runner_bench import await_that

from dyno import processes, record, runner, turns
from dyno.keeper import children
from dyno.measure import environment


def run_two(recipe) -> list[str]:
    """Run it twice at once; what both told."""
    told: list[str] = []
    runs = [threading.Thread(target=runner.run, args=(recipe,), kwargs={"progress": told.append}) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    return told


def test_one_measurement_at_a_time(recipe, worker):
    """Two runs at once on one device: the second waits, and neither sees the other's worker."""
    worker("""
        mark = directory.parent.parent / "busy"
        mark.touch(exist_ok=False)
        time.sleep(0.3)
        mark.unlink()
        done()
    """)
    told = run_two(recipe)
    assert [r["status"] for r in record.read_records(recipe.config["results_dir"])] == ["ok", "ok"]
    assert sum("waiting" in text for text in told) == 1


def test_runs_that_share_the_device_until_they_measure(recipe, worker):
    """measure.exclusive=window: both workers are alive at once, and are told the locks that they measure under."""
    worker("""
        import fcntl
        turns = json.loads((directory / "request.json").read_text())["turns"]
        place = directory.parent.parent
        (place / f"alive-{os.getpid()}").touch()
        while len(list(place.glob("alive-*"))) < 2:
            time.sleep(0.01)
        with open(turns[0], "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (place / "busy").touch(exist_ok=False)
            time.sleep(0.1)
            (place / "busy").unlink()
        done()
    """)
    recipe.config["measure"]["exclusive"] = "window"
    run_two(recipe)
    assert [r["status"] for r in record.read_records(recipe.config["results_dir"])] == ["ok", "ok"]


STILL = """
    import fcntl
    places = [Path(path) for path in json.loads((directory / "request.json").read_text())["turns"]]
    shared = directory.parent.parent

    def beats():
        return sorted(path.read_text() for path in shared.glob("beat-*"))

    try:
        (shared / "first").touch(exist_ok=False)
        measures = True
    except FileExistsError:
        measures = False
    def beat(name, count=0):
        while not (shared / "over").exists():
            count += 1
            (shared / f"new-{name}").write_text(f"{name} {count}")
            (shared / f"new-{name}").rename(shared / f"beat-{name}")
            time.sleep(0.005)
    if measures:
        while len(beats()) < 2:
            time.sleep(0.01)
        with open(places[0], "a") as lock:  # as dyno.turns.take
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(OWNER)
            lock.flush()
            time.sleep(1.0)
            before = beats()
            time.sleep(0.4)
            (shared / "seen").write_text(json.dumps([before, beats()]))
        while beats() == before:  # never, if they were not let go
            time.sleep(0.01)
        (shared / "over").touch()
    elif os.fork():
        beat("worker")
    else:  # in a session of its own, as compilers start theirs
        os.setsid()
        beat("child")
        os._exit(0)
    done()
"""


@pytest.mark.parametrize("owner", ["directory.name", '""'], ids=["a turn", "a whole run"])
def test_others_stand_still_in_a_run_s_turn(recipe, worker, owner):
    """And what they start; not in a run that has the device from its start on, and may wait for something of theirs."""
    worker(STILL.replace("OWNER", owner))
    recipe.config["measure"]["exclusive"] = "window"
    told = run_two(recipe)
    place = Path(recipe.config["results_dir"])
    found = record.read_records(place)
    assert [r["status"] for r in found] == ["ok", "ok"]
    before, after = json.loads((place / "seen").read_text())
    stood = sorted(r["details"].get("stood_still_s", 0.0) for r in found)
    assert (before == after) == (owner != '""') and len(before) == 2
    assert stood[0] == 0 and (0.5 < stood[1] < 20 if before == after else stood[1] == 0)
    assert ("stands still: another run measures" in told) == (before == after)


def test_a_limit_does_not_count_the_time_that_a_run_stood_still(tmp_path):
    asked = iter(["another"] * 80)
    code = "import time; [time.sleep(0.01) for _ in range(50)]"
    out = processes.run_group(
        [sys.executable, "-c", code], 1, dict(os.environ), tmp_path / "log", 3, lambda text: None,
        stands=lambda: next(asked, ""),
    )  # fmt: skip
    assert not out.timed_out and out.codes == [0] and out.stood_s > 3


def test_a_run_stands_still_for_so_long_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STILL_S", 0.3)
    out = processes.run_group(
        [sys.executable, "-c", "import time; time.sleep(0.3)"], 1, dict(os.environ), tmp_path / "log", 30, lambda text: None,
        stands=lambda: "another",
    )  # fmt: skip
    assert out.codes == [0] and 0.3 <= out.stood_s < 5


def test_it_stands_still_again_for_the_next_one(monkeypatch):
    """Having given up on one; a name that was seen once may be that of one who was killed."""
    said, clock = [], iter(range(0, 10_000, 200))
    names = iter(["a", "a", "a", "a", "a", "b", "b", "", "c", "", "d", "d", "e", "e", ""])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    stand = processes.Stand(lambda: next(names), lambda text: None)
    told = []
    for _ in range(15):
        stand.look(SimpleNamespace(link=SimpleNamespace(send=said.append)))
        told.append(b"".join(said).decode())
        said.clear()
    assert told == ["", "s", "", "c", "", "", "s", "c", "", "", "", "s", "", "", "c"] and stand.seconds == 1200


def test_a_run_that_stands_still_is_ended_like_any_other(tmp_path):
    """Signals but SIGKILL wait in a stopped process."""
    stand = processes.Stand(lambda: "another", lambda text: None)
    command = {
        "command": [sys.executable, "-c", "import time; time.sleep(60)"],
        "ranks": 1,
        "environment": dict(os.environ),
    }
    with (tmp_path / "log").open("ab") as sink:
        keeper = processes._begin(None, dict(os.environ), [sink.fileno()], 10)
        keeper.link.sendall(json.dumps(command).encode() + b"\n")
        assert await_that(lambda: children(keeper.process.pid))
        (pid,) = children(keeper.process.pid)
        for _ in range(2):
            stand.look(keeper)
        assert await_that(lambda: state(pid) == "T")
        ends = json.loads(keeper.end())
        keeper.close()
    assert ends["codes"] == [-signal.SIGKILL]


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_the_lock_of_one_who_died_is_nobody_s(tmp_path):
    path = tmp_path / "gpu.lock"
    assert turns.owner_of(path) == ""
    with turns.take(path, "you"):
        assert turns.owner_of(path) == "you"
    assert path.read_text() == "" and turns.owner_of(path) == ""
    with turns.take(path):
        assert turns.owner_of(path) == ""
    code = "import os, sys, pathlib; from dyno import turns\nwith turns.take(pathlib.Path(sys.argv[1]), 'you'): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert path.read_text() == "you" and turns.owner_of(path) == ""


def test_a_full_disk_costs_a_turn_its_name_alone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(turns.os, "write", full)
    with turns.take(tmp_path / "gpu.lock", "you"):
        assert turns.owner_of(tmp_path / "gpu.lock") == ""


def test_what_a_start_took_is_not_known_of_a_run_that_stood_still():
    metrics = {"startup_s": {"value": 9.0, "unit": "s"}, "step_time_s": {"value": 0.1, "unit": "s"}}
    result = {"status": "ok", "metrics": metrics, "details": {"phases": {}}}
    assert runner.with_stands(json.loads(json.dumps(result)), 0.0) == result
    out = runner.with_stands(result, 2.5)
    assert out["details"] == {"phases": {}, "stood_still_s": 2.5} and set(out["metrics"]) == {
        "startup_s",
        "step_time_s",
    }
    assert out["metrics"]["startup_s"] == {
        "value": None, "unit": "s", "count": 0, "reason": "stood still for 2.5 s while other runs measured",
    }  # fmt: skip
    assert out["metrics"]["step_time_s"]["value"] == 0.1


def test_who_had_its_turn_stands_still_for_nobody(tmp_path):
    paths = [tmp_path / "a.lock", tmp_path / "b.lock"]
    watch = turns.Watch(paths, "me")
    with turns.take(paths[1], "you"):
        assert watch.other() == "you"
    assert watch.other() == ""
    with turns.take(paths[0], "me"), turns.take(paths[1], "you"):
        assert watch.other() == ""
    with turns.take(paths[0], "you"):
        assert watch.other() == ""


class Gpu:
    """What the locks ask of an NVML device."""

    def __init__(self, number: int):
        self.number = number

    def uuid(self) -> str:
        return f"GPU-{self.number}"

    def name(self) -> str:
        return f"gpu {self.number}"


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Four GPUs that are none; gpus(mask) is the first that a process with this CUDA_VISIBLE_DEVICES sees."""
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(environment, "devices", lambda: [Gpu(number) for number in range(4)])

    def first(mask: str) -> environment.Device:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        gpu = Gpu(int(mask[0]))
        return environment.Device("cuda", 0, gpu.name(), 1, (9, 0), gpu.uuid(), len(mask.split(",")))

    return first


def test_a_run_of_several_gpus_holds_each_of_them(gpus):
    told: list[str] = []
    with runner.exclusive(gpus("2,0,1"), 2, told.append) as held:
        assert [Path(f"/proc/self/fd/{lock}").resolve().name for lock in held] == ["cuda-GPU-0.lock", "cuda-GPU-2.lock"]
        for mask, free in (("1", True), ("3", True), ("2", False), ("0", False)):
            device, waits = gpus(mask), threading.Event()

            def other(device=device, waits=waits) -> None:
                with runner.exclusive(device, 1, lambda text: waits.set()):
                    pass

            thread = threading.Thread(target=other, daemon=True)
            thread.start()
            assert waits.wait(0.2 if free else 10) != free
            if free:
                thread.join(10)
                assert not thread.is_alive()
    thread.join(10)
    assert not thread.is_alive() and told == []


def test_runs_that_share_gpus_in_other_orders_do_not_block_each_other(gpus):
    """Each of four threads holds two of three GPUs a hundred times, and no GPU has two holders."""
    holders = {f"gpu {number}": threading.Lock() for number in range(4)}
    devices = [(gpus(mask), environment.used(gpus(mask), 2)) for mask in ("0,1", "1,0", "1,2", "2,0")]

    def work(device: environment.Device, used: dict[str, str]) -> None:
        for _ in range(100):
            with runner.exclusive(device, 2, lambda text: None):
                for name in used.values():
                    assert holders[name].acquire(blocking=False)
                for name in used.values():
                    holders[name].release()
                finished.append(name)

    finished: list[str] = []
    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "used", lambda device, ranks: next(u for d, u in devices if d is device))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(finished) == 400
