"""Memory that is lent: once at a time, and again when nobody holds it."""

import threading

import torch

from pipelines.memory import Lender


def test_memory_is_lent_again_only_when_its_last_view_is_gone() -> None:
    lender = Lender((4, 3), torch.float32)
    first = lender.take()
    address, view = first.data_ptr(), first[1:].t()
    del first
    other = lender.take()
    assert other.data_ptr() != address
    view[0, 0] = 7
    del view
    assert lender.take().data_ptr() == address
    assert lender.take().data_ptr() == address
    del other


def test_arrays_and_graphs_hold_it_too() -> None:
    lender = Lender((5,), torch.float32)
    array = lender.take().numpy()
    weight = torch.ones(5, requires_grad=True)
    loss = (weight * lender.take()).sum()
    addresses = {array.ctypes.data, lender.take().data_ptr()}
    assert len(lender._storages) == 3 and len(addresses) == 2
    loss.backward()
    del array, loss
    taken = [lender.take() for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in taken}) == len(lender._storages) == 3


def test_another_thread_may_be_the_last_to_hold_it() -> None:
    lender = Lender((8,), torch.uint8)
    held = [lender.take()]
    address = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert lender.take().data_ptr() == address


def test_shape_and_type() -> None:
    lent = Lender((2, 5), torch.uint8).take()
    assert lent.shape == (2, 5) and lent.dtype == torch.uint8 and lent.is_contiguous()
