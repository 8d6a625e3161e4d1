"""state.json while the engine lives: what it is doing now, refreshed by a thread so that a long encode still beats."""

import logging
import os
import threading

from crumb.engine.run.directory import HEARTBEAT_S, RunDirectory, write_state

log = logging.getLogger("crumb")


class SilentStatus:
    """What a process that is not the first of its run has for a Status."""

    def __init__(self, step: int = 0):
        self.pid, self.step, self.phase = os.getpid(), step, ""

    def update(self, **fields) -> None:
        self.step, self.phase = fields.get("step", self.step), fields.get("phase", self.phase)

    def close(self, **fields) -> None:
        """Nothing is written."""


class Status:
    """The engine's side of state.json. Fields: state, phase, step, steps, pid, num_processes, exit_code, message,
    heartbeat."""

    def __init__(self, run: RunDirectory, **fields):
        self._run = run
        self._fields = {"state": "preparing", "phase": "", "step": 0, "steps": 0, "pid": os.getpid(), "message": "", **fields}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._fields["pid"]

    @property
    def step(self) -> int:
        return self._fields["step"]

    @property
    def phase(self) -> str:
        return self._fields["phase"]

    def update(self, **fields) -> None:
        """Takes new values; a change of state or phase is on disk at once, a new step at the next beat."""
        changed = any(self._fields.get(name) != fields[name] for name in ("state", "phase") if name in fields)
        self._fields.update(fields)
        if changed:
            self._write()

    def close(self, **fields) -> None:
        """The last word; after it nothing is written any more."""
        self._closed.set()
        self._thread.join()
        self._fields.update(fields)
        self._write()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            self._write()

    def _write(self) -> None:
        with self._lock:
            try:
                write_state(self._run, **self._fields)
            except OSError as error:  # a full disk must not end the beat, nor hide the error that is being told
                log.warning("state.json could not be written: %s", error)
