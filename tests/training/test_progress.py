import io
import time

from transfer_jax.training.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_are_rate_limited_and_the_last_state_is_always_written():
    stream = io.StringIO()
    progress = Progress(100, "source", stream, interval=3600)
    for step in range(1, 101):
        progress.update(step, {"train/loss": 1 / step})
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "source: step 1/100  loss 1",
        "source: step 100/100  loss 0.01",
    ]


def test_plain_lines_show_values_by_their_usual_names_and_the_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = Progress(7300, "target", stream, interval=5.0)
    for step in range(1, 31):
        progress.update(step, {"time/examples_per_second": 512.0, "learning_rate": 3e-4,
                               "train/loss": 0.25, "eval/accuracy": 0.75})  # fmt: skip
        clock[0] += 0.5
    lines = stream.getvalue().splitlines()
    values = "loss 0.25  lr 0.0003  examples/s 512  eval/accuracy 0.75"
    # Steps 1, 11, 21 are five seconds apart: half a second a step.
    assert lines == [
        f"target: step 1/7300  {values}",
        f"target: step 11/7300  {values}  1:00:44 left",
        f"target: step 21/7300  {values}  1:00:40 left",
    ]


def test_values_stay_until_replaced_and_messages_are_written_at_once():
    stream = io.StringIO()
    progress = Progress(2, "s", stream, interval=0.0)
    progress.update(1, {"loss": 2.0})
    progress.message("checkpoint saved [step 1]")
    progress.update(2)
    progress.close()
    assert stream.getvalue() == (
        "s: step 1/2  loss 2\ncheckpoint saved [step 1]\ns: step 2/2  loss 2\n"
    )


def test_a_terminal_gets_a_bar():
    stream = _Terminal()
    with Progress(10, "distil", stream) as progress:
        progress.update(10, {"train/loss": 0.125})
        progress.message("evaluated [at step 10]")
    text = stream.getvalue()
    assert "distil" in text and "10/10" in text and "loss 0.125" in text
    assert "evaluated [at step 10]" in text


def test_a_process_that_is_not_the_first_says_nothing():
    stream = io.StringIO()
    with Progress(10, "x", stream, interval=0.0, enabled=False) as progress:
        progress.update(1, {"loss": 1.0})
        progress.message("hello")
    assert stream.getvalue() == ""
