"""Progress in a log instead of a terminal."""

import logging
import threading
import time

import pytest

from pipeline import progress
from pipeline.progress import progress_bar


def test_log_gets_a_line_per_interval(caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.05)
    caplog.set_level(logging.INFO)
    started = time.monotonic()
    with progress.progress_bar(100, "extract", "image") as bar:
        for _ in range(100):
            time.sleep(0.002)
            bar.update()
    assert 1 <= len(caplog.messages) <= (time.monotonic() - started) / 0.05 + 1  # a busy machine sleeps longer
    assert (
        caplog.messages[0].startswith("extract:") and "left" in caplog.messages[0] and "image/s" in caplog.messages[0]
    )


def test_short_work_logs_nothing(caplog):
    caplog.set_level(logging.INFO)
    assert list(progress.track(range(5), "x", 5)) == list(range(5))
    with pytest.raises(ValueError), progress.progress_bar(5, "x", "step") as bar:
        bar.update()
        raise ValueError
    assert not caplog.messages


def test_bars_share_one_thread():
    with progress_bar(2, "first", "step"):
        before = threading.active_count()
        for _ in range(5):
            with progress_bar(2, "another", "step"):
                pass
        assert threading.active_count() == before
