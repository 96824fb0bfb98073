"""Energy from replayed logs: what is valid, and every way of being invalid. No GPU."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dyno.measure import energy
from dyno.measure.nvml import NotMeasured, throttle_names
from dyno.measure.power import NullPower, PowerLog, ReplayPower, log_line, probe_tick_s, read_log
from dyno.measure.sampler import Sampler


def make_log(watts=500.0, seconds=14.0, period=0.05, temperature=50.0, start=0.0):
    t = start + np.arange(0, seconds, period)
    power = np.full_like(t, watts)
    return PowerLog(t, power, watts * t, np.full_like(t, temperature), np.full_like(t, 1980.0), np.zeros_like(t))


def judge(log, counter_j=6000.0, start=1.0, end=13.0, **more):
    return energy.judge(counter_j, start, end, log, limit_w=700.0, tick_s=0.1, **more)


def test_a_valid_region():
    found = judge(make_log())
    assert found.code is None
    assert found.energy_j == 6000.0
    assert found.mean_power_w == pytest.approx(500.0)
    assert found.sampled_j == pytest.approx(6000.0)


def test_integration_follows_the_power_between_readings():
    t = np.arange(0, 3, 0.05)
    log = PowerLog(t, 100 * t, *(np.zeros_like(t) for _ in range(4)))
    assert energy.integrate(log, 0.51, 2.03) == pytest.approx(50 * (2.03**2 - 0.51**2), rel=1e-3)


@pytest.mark.parametrize(
    ("code", "log", "changes"),
    [
        ("not_measured", make_log(), {"counter_j": None, "reason": "no driver"}),
        ("too_short", make_log(), {"end": 10.9}),
        ("no_cross_check", make_log(seconds=6), {}),
        ("no_cross_check", PowerLog(*(np.empty(0) for _ in range(6))), {}),
        ("counter_disagrees", make_log(), {"counter_j": 5600.0}),
        ("implausible_power", make_log(watts=60.0), {"counter_j": 720.0}),
        ("implausible_power", make_log(watts=900.0), {"counter_j": 10800.0}),
        ("implausible_temperature", make_log(temperature=120.0), {}),
        ("implausible_temperature", make_log(temperature=5.0), {}),
    ],
)
def test_invalid_energy_is_empty_with_a_reason(code, log, changes):
    found = judge(log, **changes)
    assert found.energy_j is None
    assert found.code == code
    assert found.reason


def test_a_hole_in_the_log_is_no_cross_check():
    log = make_log()
    kept = np.abs(log.time_s - 6) > 0.3
    holed = PowerLog(*(column[kept] for column in vars(log).values()))
    assert judge(holed).code == "no_cross_check"


def test_a_short_region_still_tells_its_power():
    found = judge(make_log(), counter_j=1500.0, end=4.0)
    assert found.code == "too_short"
    assert found.mean_power_w == pytest.approx(500.0)


def test_the_tick_decides_how_long_is_long_enough():
    assert energy.judge(6000.0, 1.0, 13.0, make_log(), limit_w=700.0, tick_s=0.2).code == "too_short"


def test_a_log_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    source = ReplayPower(make_log(), 700.0, now=lambda: 3.0)
    path = tmp_path / "power.log"
    path.write_text("# tick_s=0.1\n" + log_line(3.0, source) + log_line(3.05, source) + "3.1\t50")
    log = read_log(path)
    assert len(log) == 2
    assert log.power_w[0] == 500.0
    assert log.energy_j[0] == pytest.approx(1500.0)
    assert len(read_log(tmp_path / "none")) == 0


def test_what_a_device_does_not_give_is_nan_in_the_log(tmp_path):
    path = tmp_path / "power.log"
    path.write_text(log_line(1.0, NullPower("no driver")))
    assert np.isnan(read_log(path).power_w[0])
    with pytest.raises(NotMeasured, match="the log has no such reading"):
        ReplayPower(read_log(path), 700.0).power_w()


def test_null_power_says_why():
    null = NullPower("no driver")
    for read in (null.energy_j, null.power_w, null.temperature_c, null.limit_w, null.clock_mhz, null.throttle_bits):
        with pytest.raises(NotMeasured, match="no driver"):
            read()


def test_tick_is_probed_from_the_counter():
    moment = [0.0]

    def now():
        moment[0] += 0.001
        return moment[0]

    t = np.arange(0, 2, 0.1)
    zeros = np.zeros_like(t)
    stepping = ReplayPower(PowerLog(t, zeros, 50 * t, zeros, zeros, zeros), 700.0, now)
    assert probe_tick_s(stepping, now) == pytest.approx(0.1, abs=0.01)
    still = ReplayPower(PowerLog(t, zeros, zeros, zeros, zeros, zeros), 700.0, now)
    assert probe_tick_s(still, now) is None


def test_throttle_bits_have_names():
    assert throttle_names(0x48) == ["hw_slowdown", "hw_thermal"]
    assert throttle_names(0) == []


def replay_file(tmp_path):
    """A log whose counter has moved every 0.1 s since now, for a minute."""
    t = time.monotonic() + np.arange(-1, 60, 0.1)
    source = tmp_path / "source.log"
    source.write_text("".join(f"{x:.6f}\t300\t{300 * (x - t[0]):.3f}\t45\t1980\t0\n" for x in t))
    return source


def test_the_sampler_logs_from_its_own_process(tmp_path):
    sampler = Sampler(tmp_path / "power.log", ["--replay", str(replay_file(tmp_path))])
    try:
        assert sampler.wait_for(time.monotonic(), patience_s=60)
        assert sampler.wait_for(sampler.last_s() + 0.001, patience_s=60)
        log = sampler.read()
        assert len(log) >= 2
        assert set(log.power_w) == {300.0}
        assert sampler.tick_s() == pytest.approx(0.1, rel=0.9)
        assert sampler.process.pid != os.getpid()
    finally:
        sampler.stop()
    assert sampler.process.returncode is not None


def test_the_sampler_dies_with_a_killed_parent(tmp_path):
    source, log, pid_file = replay_file(tmp_path), tmp_path / "power.log", tmp_path / "pid"
    script = (
        "import pathlib, time; from dyno.measure.sampler import Sampler;"
        f"s = Sampler(pathlib.Path({str(log)!r}), ['--replay', {str(source)!r}]); s.wait_for(time.monotonic(), 60);"
        f"pathlib.Path({str(pid_file)!r} + '.new').write_text(str(s.process.pid));"
        f"pathlib.Path({str(pid_file)!r} + '.new').rename({str(pid_file)!r}); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(pid_file.exists)
        pid = int(pid_file.read_text())
        os.kill(parent.pid, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: is_gone(pid))


def test_the_sampler_imports_no_torch():
    code = (
        "import sys, dyno.measure.sampler, dyno.measure.environment, dyno.measure.row; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def is_gone(pid):
    """Dead, or dead and not yet collected by whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until(condition, patience_s=60):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
