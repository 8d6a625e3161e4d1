"""What earlier runs took is remembered, whatever happens to the file."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from crumb.profiles import measured as measured_module
from crumb.profiles.measured import KEPT, Measured, memory_factor, record, remembered, time_factor
from crumb.profiles.paths import state_dir

RUN = Measured("NVIDIA GeForce RTX 3060", 1024, 1, "no", 1.0, 1.5, 8e9, 8.4e9, {"torch": "2.13.0"})


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return state_dir() / "measured.jsonl"


def test_the_factor_is_the_median_of_the_last_few_of_card_and_format():
    assert time_factor("RTX 3060", "no") == 1.0
    for seconds in (9.0, 1.2, 1.4, 1.6, 1.3, 1.5):
        assert record(replace(RUN, measured_s=seconds))
    assert record(replace(RUN, base_format="nf4", measured_s=3.0)) and record(replace(RUN, gpu="Tesla T4", measured_s=5.0))
    assert time_factor("RTX 3060", "no") == time_factor(RUN.gpu, "no") == 1.4, "9.0 is too long ago"
    assert (time_factor("RTX 3060", "nf4"), time_factor("T4", "no"), time_factor("RTX 3060 Ti", "no")) == (3.0, 5.0, 1.0)
    assert memory_factor("RTX 3060", "no") == pytest.approx(1.05)


def test_what_says_nothing_is_not_counted():
    for wrong in ({"measured_s": 500.0}, {"predicted_s": 0.0}, {"measured_s": float("nan")}, {"arithmetic": 0}):
        assert record(replace(RUN, **wrong))
    assert time_factor(RUN.gpu, "no") == 1.0
    record(RUN)
    assert time_factor(RUN.gpu, "no") == 1.5


def test_a_damaged_file_costs_the_damaged_lines(file):
    record(RUN)
    good = file.read_text()
    file.write_bytes(b"\xff\x00torn\n" + good.encode() + b'[1]\n{"gpu": 1}\nnull\n' + b"[" * 9999 + b"\n"
                     + json.dumps(asdict(RUN) | {"measured_s": "1.5"}).encode() + b"\n" + good.encode()[:30])
    assert remembered() == [RUN] and record(RUN) and remembered() == [RUN, RUN]
    assert len(file.read_text().splitlines()) == 2
    file.unlink()
    file.mkdir()
    assert remembered() == [] and not record(RUN) and time_factor(RUN.gpu, "no") == 1.0


def test_where_nothing_can_be_written_nothing_happens(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "taken"))
    assert not record(RUN) and remembered() == []


def test_the_file_stays_small(file, monkeypatch):
    file.write_text((json.dumps(asdict(RUN)) + "\n") * (KEPT + 50))
    record(replace(RUN, measured_s=2.0))
    assert len(remembered()) == KEPT and remembered()[-1].measured_s == 2.0
    monkeypatch.setattr(measured_module, "MAX_FILE_BYTES", 1000)
    assert 0 < len(remembered()) <= 5, "of a file that grew by other hands only the end is read"


def test_writers_at_the_same_time_lose_nothing():
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: record(replace(RUN, batch_size=n)), range(40)))
    assert sorted(run.batch_size for run in remembered()) == list(range(40))
