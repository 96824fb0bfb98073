"""One measurement at a time on a device, and a run of several devices holds them all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dyno import record, runner
from dyno.measure import environment


def test_one_measurement_at_a_time(recipe, worker):
    """Two runs at once on one device: the second waits, and neither sees the other's worker."""
    worker("""
        mark = directory.parent.parent / "busy"
        mark.touch(exist_ok=False)
        time.sleep(0.3)
        mark.unlink()
        done()
    """)
    told: list[str] = []
    runs = [threading.Thread(target=runner.run, args=(recipe,), kwargs={"progress": told.append}) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
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
    runs = [threading.Thread(target=runner.run, args=(recipe,)) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert [r["status"] for r in record.read_records(recipe.config["results_dir"])] == ["ok", "ok"]


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
