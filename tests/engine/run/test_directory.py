"""The run directory under the hands of two processes, a crash and a person with an odd name for it."""

import os
import subprocess
import sys

import pytest

from crumb.engine.run.control import clear_requests, request, take_request
from crumb.engine.run.directory import (
    create_run,
    engine_is_alive,
    engine_lock,
    find_run,
    list_runs,
    read_state,
    write_atomic,
    write_state,
)
from crumb.engine.run.events import EventWriter, read_events
from crumb.engine.run.status import Status
from crumb.profiles.errors import BusyError, RequestError


def test_a_run_is_never_written_over(tmp_path):
    run = create_run("cat", "a plan")
    assert run.path == tmp_path / "runs" / "cat" and oct(run.path.stat().st_mode)[-3:] == "700"
    with pytest.raises(RequestError, match="crumb resume cat"):
        create_run("cat", "another plan")
    assert run.plan.read_text() == "a plan"


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", "a:b", "<x>", "x" * 81, "trailing ", "-dash"])
def test_bad_names_are_refused(name):
    with pytest.raises(RequestError, match="can't be used"):
        create_run(name, "plan")


@pytest.mark.parametrize("name", ["我的猫", "cat v2", "cat_2.1-final", "Ünï"])
def test_good_names(name):
    assert create_run(name, "plan").result.name == f"{name}.safetensors"


def test_runs_are_found_from_any_folder(tmp_path, monkeypatch):
    create_run("first", "plan")
    second = create_run("second", "plan")
    os.utime(second.plan, (2e9, 2e9))
    monkeypatch.setenv("CRUMB_RUNS", str(tmp_path / "elsewhere"))
    assert [run.name for run in list_runs() if run.path.parent == tmp_path / "runs"] == ["second", "first"]
    assert find_run("first").path == tmp_path / "runs" / "first" and find_run(None).name == "second"
    assert find_run(str(second.path)).path == second.path
    with pytest.raises(RequestError, match="third"):
        find_run("third")


def test_lock_belongs_to_the_living(tmp_path):
    run = create_run("cat", "plan")
    write_state(run, state="training", step=3, steps=9)
    assert not engine_is_alive(run) and read_state(run)["state"] == "lost"
    code = ("import sys, time; from pathlib import Path; from crumb.engine.run.directory import *\n"
            "with engine_lock(RunDirectory(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-P", "-c", code, str(run.path)], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert engine_is_alive(run) and read_state(run)["state"] == "training"
        with pytest.raises(BusyError, match="crumb watch cat"), engine_lock(run):
            pass
    finally:
        holder.kill()
        holder.wait()
    with engine_lock(run):
        assert engine_is_alive(run)


def test_half_a_line_waits_for_its_rest(tmp_path):
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.emit("phase", phase="scan")
    with path.open("ab") as file:
        file.write(b'{"type": "step", "st')
    events, offset = read_events(path)
    assert [event["type"] for event in events] == ["phase"]
    with path.open("ab") as file:
        file.write('ep": 1, "note": "é"}\n[]\nrubbish\n'.encode())
    more, offset = read_events(path, offset)
    assert [event["step"] for event in more] == [1] and offset == path.stat().st_size


def test_a_killed_writers_half_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "step", "st')
    writer = EventWriter(path)
    writer.emit("started", step=0)
    assert [event["type"] for event in read_events(path)[0]] == ["started"]


def test_requests_are_taken_once():
    run = create_run("cat", "plan")
    request(run, "stop")
    request(run, "stop")
    assert take_request(run, "stop") and not take_request(run, "stop")
    request(run, "sample")
    clear_requests(run)
    assert not take_request(run, "sample")


def test_status_beats_while_the_engine_is_busy(monkeypatch):
    monkeypatch.setattr("crumb.engine.run.status.HEARTBEAT_S", 0.05)
    run = create_run("cat", "plan")
    with engine_lock(run):
        status = Status(run, steps=5)
        first = read_state(run)["heartbeat"]
        status.update(step=2)
        for _ in range(100):
            if read_state(run)["heartbeat"] > first and read_state(run)["step"] == 2:
                break
            status._closed.wait(0.02)
        else:
            pytest.fail("no heartbeat within 2 s")
        status.close(state="done", exit_code=0)
    assert read_state(run)["state"] == "done"


def test_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    """Power cut: the content must be synced before the rename, and the folder after it."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source, target):
        calls.append(("replace", str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "a.json", b"{}")
    assert [what for what, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0][1].startswith(str(tmp_path / ".a.json")) and calls[2][1] == str(tmp_path)
