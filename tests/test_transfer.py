"""Copies into slots: whole, in order, and with their errors told."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.runtime.errors import StoreError
from predict_train.runtime.formats import ExpertFormat
from predict_train.runtime.formats.full import FullFormat
from predict_train.runtime.host.transfer import ThreadTransfers, Transfers, make_transfers
from predict_train.runtime.store import Bytes, empty_blocks
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = 5000


class Numbers:
    """A store of ten blocks, each filled with its own number; reads wait while `gate` is closed."""

    def __init__(self) -> None:
        module = nn.Module()
        module.down_proj = nn.Parameter(torch.empty(1, 1, SIZE))
        self.format: ExpertFormat = FullFormat.of(module)
        self.extent = 2, 10
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[int] = []

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        self.begun.append(expert)
        self.gate.wait()
        if layer:
            raise StoreError(f"expert {expert} is lost")
        into.view(np.float32)[:] = expert

    def close(self) -> None:
        pass


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")}


def numbers(transfers: Transfers) -> torch.Tensor:
    """What is in the slots, `[slots, numbers]`."""
    return transfers.slots.view(torch.float32)


@contextmanager
def transfers_of(store: Numbers, device: str = "cpu", slots: int = 3, readers: int = 1) -> Iterator[Transfers]:
    memory = empty_blocks(slots, store.format.bytes, torch.device(device)).fill_(0xFF)
    transfers = make_transfers(store, memory, readers)
    try:
        yield transfers
    finally:
        store.gate.set()
        transfers.close()


@pytest.mark.parametrize("device", DEVICES)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.sampled_from(["start", "wait", "hurry", "cancel"])),
        max_size=30,
    ),
    readers=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_a_slot_holds_what_was_last_started(device: str, events: list[tuple[int, int, str]], readers: int) -> None:
    with transfers_of(Numbers(), device, readers=readers) as transfers:
        last: dict[int, int] = {}
        for slot, number, event in events:
            if event == "start":
                transfers.start(slot, (0, number), urgent=number % 2 == 0)
                last[slot] = number
            elif event == "hurry":
                transfers.hurry(slot)
            elif event == "cancel" and transfers.cancel(slot):
                last.pop(slot, None)  # what it holds is unknown: the copy before may have been cancelled as well
            elif event == "wait" and slot in last:
                transfers.wait(slot)
                assert (numbers(transfers)[slot] == last[slot]).all()
                assert not transfers.copying(slot)
                transfers.computed(slot)
        for slot, number in last.items():
            transfers.wait(slot)
            assert (numbers(transfers)[slot] == number).all()
        assert transfers.stalled_seconds() >= 0


def test_a_copy_that_fails_says_so_when_it_is_waited_for() -> None:
    with transfers_of(Numbers()) as transfers:
        transfers.start(0, (1, 4), urgent=True)
        transfers.start(1, (0, 5), urgent=True)
        transfers.wait(1)
        with pytest.raises(StoreError, match="expert 4 is lost"):
            transfers.wait(0)
        transfers.start(0, (0, 5), urgent=True)
        transfers.wait(0)
        assert (numbers(transfers)[:2] == 5).all()


def test_what_is_urgent_goes_before_what_waits() -> None:
    store = Numbers()
    with transfers_of(store, slots=5) as transfers:
        store.gate.clear()
        transfers.start(0, (0, 0), urgent=True)
        while not store.begun:
            time.sleep(0.001)
        for slot in (1, 2, 3):
            transfers.start(slot, (0, slot), urgent=False)
        transfers.start(4, (0, 4), urgent=True)
        transfers.hurry(3)
        assert transfers.cancel(1)
        assert not transfers.cancel(0), "it has begun"
        assert not transfers.cancel(1), "there is none any more"
        store.gate.set()
        for slot in (0, 2, 3, 4):
            transfers.wait(slot)
        assert store.begun == [0, 4, 3, 2]
        assert transfers.stalled_seconds() > 0


def test_abandoned_copies_leave_their_slots() -> None:
    store = Numbers()
    with transfers_of(store) as transfers:
        for slot in range(3):
            transfers.start(slot, (slot % 2, slot), urgent=False)
        transfers.abandon()
        done = list(store.begun)
        numbers(transfers).fill_(7.0)
        time.sleep(0.01)
        assert (numbers(transfers) == 7).all()
        assert store.begun == done
        assert not any(transfers.copying(slot) for slot in range(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_is_killed_is_missed() -> None:
    """A thread that ends without a word (here by an exception from outside) must not be waited for forever."""
    store, before = Numbers(), readers()
    with transfers_of(store) as transfers:
        (reader,) = readers() - before
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(reader.ident or 0), ctypes.py_object(SystemExit))
        transfers.start(0, (0, 1), urgent=True)
        with pytest.raises(StoreError, match="is gone; detach the model and offload it again"):
            transfers.wait(0)


def test_transfers_that_nobody_closes_end_with_their_owner() -> None:
    store, before = Numbers(), readers()
    transfers = ThreadTransfers(store, empty_blocks(1, store.format.bytes, torch.device("cpu")), readers=2)
    transfers.start(0, (0, 1), urgent=True)
    del transfers
    gc.collect()
    assert readers() <= before
