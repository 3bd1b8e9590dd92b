"""Signals are remembered during a run, and do what they did before after it."""

import os
import signal

import pytest
import torch

from engine.launch import Launch
from engine.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    alone = Launch(0, 1, 0, torch.device("cpu"))
    with StopRequest() as stop:
        assert not stop.agreed(alone, ask=True)
        os.kill(os.getpid(), number)
        assert stop.agreed(alone, ask=False) and stop.requested
    assert signal.getsignal(number) is before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(number) is before
