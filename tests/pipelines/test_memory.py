"""Memory that is lent: once at a time, and again when nobody holds it."""

import torch

from pipelines.memory import Lender


def test_memory_is_lent_again_only_when_its_last_view_is_gone() -> None:
    lender = Lender((4, 3), torch.float32)
    first = lender.take()
    address, view = first.data_ptr(), first[1:].t()
    del first
    assert lender.take().data_ptr() != address
    view[0, 0] = 7
    del view
    again = lender.take()
    taken = {again.data_ptr(), lender.take().data_ptr()}
    assert address in taken and len(taken) == 2


def test_shape_and_type() -> None:
    lent = Lender((2, 5), torch.uint8).take()
    assert lent.shape == (2, 5) and lent.dtype == torch.uint8
