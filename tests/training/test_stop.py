"""Signals are recorded during a run; after it their former handlers are back."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from training.distributed import Launch, StopRequest


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Python's default handler of Ctrl-C, because the tests may run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_recorded_and_its_handler_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    alone = Launch(0, 1, 0, torch.device("cpu"))
    with StopRequest() as stop:
        assert not stop.agreed(alone, exchange=True)
        os.kill(os.getpid(), number)
        assert stop.agreed(alone, exchange=False) and stop.requested
    assert signal.getsignal(number) is before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("in_the_foreground")
def test_in_the_background_ctrl_c_stays_ignored_and_sigterm_stops() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alone = Launch(0, 1, 0, torch.device("cpu"))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.agreed(alone, exchange=True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(alone, exchange=True)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
