"""What `plan` advises: whether a model fits, how to run it, what it takes, and what would help most."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..room import gib
from .machine import Machine
from .plan import Shape

PROCESS = 2 << 30
"""Host memory of Python, torch, and of what is loaded on the way to the device, in bytes."""
MATTERS = 0.03
"""A change of the time of less than this share is not worth a word."""


class Place(StrEnum):
    """Where the experts are that have no slot."""

    NOWHERE = "nowhere"
    """All experts have a slot."""
    HOST = "host"
    FILE = "file"


def place_of(shape: Shape, slots: int, machine: Machine) -> Place:
    """Where the experts stay that have no slot. On a CPU the slots are in the host's memory, and the others in a file."""
    total = shape.layers * shape.num_experts
    if slots == total:
        return Place.NOWHERE
    if not machine.is_cuda:
        return Place.FILE
    return Place.HOST if machine.ram is None or total * shape.expert_bytes + PROCESS <= machine.ram else Place.FILE


@dataclass(frozen=True)
class Verdict:
    """Advice for one model on one machine."""

    place: Place
    slots: int
    experts: int
    policy: str
    """The faster one of the exact policies."""
    milliseconds: float
    """Per token, under this policy."""
    bound: str
    speculated: float
    """The time under policy `speculative` (gating `true`) over that under `policy`."""
    ram: int
    """Bytes of host memory that are needed."""
    device_memory: int
    """Bytes of the device that are needed, keys, values and the reserve included."""
    form: str = ""
    asked: str = ""
    """The form that was asked for. It is another one if the model does not fit in it."""
    others: dict[str, float] | None = None
    """By other forms in which it fits, the time over that of `form`."""
    helped: dict[str, float] | None = None
    """By what would be doubled, the time over that of `form`."""
    command: str = ""
    """What runs the model so."""

    @classmethod
    def of(
        cls, shape: Shape, place: Place, slots: int, kept: int, best: dict[str, Any], rows: list[dict[str, Any]]
    ) -> Verdict:
        """From a model's `shape`, what of the device is `kept`, and what `plan` found: all `rows`, and the `best` of them."""
        total = shape.layers * shape.num_experts
        own = best["time_per_output_token_ms"]
        [speculated] = [r["time_per_output_token_ms"] for r in rows if r["gating"] == "true"]
        on_device = shape.resident_bytes + kept + slots * shape.expert_bytes
        in_host = {Place.HOST: total * shape.expert_bytes}.get(place, 0)
        return cls(
            place, slots, total, best["policy"], own, best["bound"], speculated / own, in_host + PROCESS, on_device
        )

    def words(self, is_cuda: bool) -> list[str]:
        """Sentences."""
        where = {
            Place.NOWHERE: "all experts are on the device",
            Place.HOST: f"{self.slots:,} of {self.experts:,} experts are on the device at a time, and all are in host memory",
            Place.FILE: f"{self.slots:,} of {self.experts:,} experts are in memory at a time, and the others in a file",
        }[self.place]
        fits = (
            f"It fits {self._in_form()}"
            if self.form == self.asked
            else (f"It does not fit with experts as they are asked for, but it does {self._in_form()}")
        )
        said = [f"{fits}: {where}."]
        said.append(
            f"A token takes about {self.milliseconds:.1f} ms ({1000 / self.milliseconds:.1f} tokens/s) under policy {self.policy}, "
            "which is exact; "
            + {
                "link": "copies are the bound.",
                "compute": "the computation is the bound.",
                "waiting": "computation and copies wait for each other.",
            }[self.bound]
        )
        if self.speculated < 1 - MATTERS:
            said.append(
                f"Policy speculative takes {self.speculated * self.milliseconds:.1f} ms and changes some tokens."
            )
        faster = {name: share for name, share in (self.others or {}).items() if share < 1 - MATTERS}
        said += [
            f"With experts in {name} it takes {share * self.milliseconds:.1f} ms." for name, share in faster.items()
        ]
        helped = min((self.helped or {}).items(), key=lambda item: item[1], default=("", 1.0))
        said.append(
            f"What would help most is {helped[0]}: {helped[1] * self.milliseconds:.1f} ms."
            if helped[1] < 1 - MATTERS
            else "Nothing that is only doubled would make it much faster."
        )
        needed = f"It needs {gib(self.device_memory)} of the device and {gib(self.ram)} of host memory."
        said.append(needed if is_cuda else f"It needs {gib(self.device_memory + self.ram)} of memory.")
        return said

    def _in_form(self) -> str:
        return "as it is" if self.form == "unquantized" else f"with experts in {self.form}"
