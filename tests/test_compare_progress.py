from pathlib import Path

import pytest
from test_compare_report import failed, plan, report_of, row

from lightning_rdrop.compare import progress
from lightning_rdrop.compare.progress import Progress
from lightning_rdrop.compare.run import Run

pytest.importorskip("rich")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


RUNS = [Run(name, seed, {}, Path()) for seed in (1, 2) for name in ("plain", "rdrop")]


def test_the_time_left_is_that_of_the_runs_that_wait(clock, capsys):
    rows = []
    with Progress(5, RUNS) as shown:  # one was finished earlier
        for run, now, ended in zip(
            RUNS[:3],
            (120.0, 360.0, 380.0),  # a run takes 20 s longer than its training
            (row("plain", 1, 0.5, seconds=100.0), row("rdrop", 1, 0.6, seconds=220.0), failed("plain", 2)),
            strict=True,
        ):
            clock[0] = now
            rows.append(ended)
            shown.ended(run, ended, report_of(plan("plain", "rdrop"), rows))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "[2/5] plain, seed 1: test/accuracy 0.5000, test/ce 0.5000. about 6 min left"  # 3 * 100 s * 1.2
    assert second == "[3/5] rdrop, seed 1: test/accuracy 0.6000, test/ce 0.4000. about 6 min left"  # 320 s * 1.125
    assert third == "[4/5] plain, seed 2: failed: KeyError: 'x'. about 4 min left"  # 220 s * 1.1875


def test_a_terminal_has_the_table_so_far_and_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(4, RUNS) as shown:
        clock[0], ended = 7200.0, row("plain", 1, 0.5, seconds=7000.0)
        shown.ended(RUNS[0], ended, report_of(plan("plain", "rdrop"), [ended]))
    printed = capsys.readouterr().out
    for part in ("test/accuracy", "reference", "1/4", "about 6.0 h left"):
        assert part in printed
