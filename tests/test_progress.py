"""What long work says: lines in a log, a bar on a terminal, nothing where it was asked for."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from corda_vlm import progress
from corda_vlm.progress import Meter, advance, be_quiet, note, showing, track


class Log:
    """What has been written to the standard error so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.text = capsys, ""

    def getvalue(self) -> str:
        self.text += self.capsys.readouterr().err
        return self.text

    def wait_for(self, pattern: str) -> str:
        until = time.monotonic() + 60
        while not re.search(pattern, self.getvalue()):
            assert time.monotonic() < until, f"no {pattern!r} in {self.text!r}"
            time.sleep(0.01)
        return self.text


@pytest.fixture
def log(monkeypatch, capsys) -> Log:
    """A standard error that is a file, with a line every twentieth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return Log(capsys)


def test_a_log_gets_lines_with_step_loss_and_time_left(log):
    with Meter("training", 100, initial=40) as meter:
        meter.update(20, loss="0.310")
        said = log.wait_for("\n")
    assert re.match(r"training: step 60 of 100, loss 0.310; \d+ s so far, \d+ s left\n", said)
    assert "\r" not in log.getvalue()


def test_a_log_gets_lines_while_one_step_lasts(log):
    with Meter("loading"):
        log.wait_for(r"(loading: \d+ s so far\n){2}")


def test_what_is_short_says_nothing(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 60.0)
    with Meter("training", 2) as meter:
        meter.update(2)
    assert log.getvalue() == ""


def test_the_last_line_tells_the_end(log):
    with Meter("training", 2) as meter:
        log.wait_for("0 of 2")
        meter.update(2)
    assert "step 2 of 2" in log.getvalue().splitlines()[-1]
    silent = log.getvalue()
    time.sleep(0.2)
    assert log.getvalue() == silent


@pytest.mark.parametrize("how", ["TQDM_DISABLE", "quiet", "shown"])
def test_nothing_is_shown_where_it_is_not_wanted(how, log, monkeypatch, capsys):
    show = how != "shown"
    if how == "TQDM_DISABLE":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    be_quiet(how == "quiet")
    try:
        with showing(show), showing(True), Meter("training", 2) as meter:
            meter.update(1)
            time.sleep(0.2)
        note("one of two")
    finally:
        be_quiet(False)
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == ("" if how == "quiet" else "one of two\n")


def test_a_terminal_gets_a_bar(log, monkeypatch):
    monkeypatch.setattr(progress, "_on_a_screen", lambda: True)
    with Meter("training", 3) as meter:
        for _ in range(3):
            meter.update(loss="1.0")
    assert "\r" in log.getvalue()


def test_the_innermost_work_is_what_advances(log):
    with Meter("outer", 2) as outer:
        with Meter("inner", 5) as inner:
            advance(3)
        advance()
        assert list(track([1, 2, 3], "more", unit="thing")) == [1, 2, 3]
    assert (outer.done, inner.done) == (1, 3)
    advance()  # nothing is under way


def test_a_log_that_cannot_be_written_stops_no_work(log, monkeypatch):
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys, "stdout", Full())
    with Meter("training", 2) as meter:
        time.sleep(0.2)
        meter.update(2)
    note("done")


def test_only_the_work_within_speaks(log):
    with Meter("corda-vlm run", bar=False):
        log.wait_for(r"corda-vlm run: \d+ s so far")
        with Meter("training", 3):
            log.wait_for("training: step 0 of 3")
            told = log.getvalue().count("corda-vlm run")
            time.sleep(0.3)
        assert log.getvalue().count("corda-vlm run") == told


def test_what_has_no_steps_draws_no_bar(log, monkeypatch):
    monkeypatch.setattr(progress, "_on_a_screen", lambda: True)
    with Meter("corda-vlm run", bar=False):
        time.sleep(0.2)
    assert log.getvalue() == ""


def test_a_training_in_a_log_tells_step_loss_and_time_left(tmp_path):
    """The verb as a person starts it under nohup."""
    code = (
        "import sys; from corda_vlm import progress; progress.EVERY = 0.2\n"
        "from corda_vlm.__main__ import main; main(sys.argv[1:])"
    )
    words = ["run", "configs/demo.yaml", "--only", "lora", "--output", str(tmp_path / "run")]
    words += ["--set", "seeds=[0]", "--set", "training.steps=12", "--set", "training.log_every=12"]
    words += ["--set", "variants.lora.learning_rates=[1e-3]", "--set", "suite=emoji-digits-val"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith("training: step")]
    assert any(re.search(r"step \d+ of 12, loss \d.*; \d+ s so far, \d+ s left", x) for x in told)
    assert any(re.match(r"emoji-val: example [\d,]+ of \d+", x) for x in ran.stderr.splitlines())
    assert "\r" not in ran.stderr + ran.stdout
    assert "Loading weights" not in ran.stderr
