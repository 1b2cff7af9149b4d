"""How much room experts have on a device: its free memory less the other weights, keys and values, and a reserve."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..predictors.architecture import ExpertLayer, skeleton
from ..predictors.experts import expert_modules
from ..predictors.generation import CACHE
from ..predictors.override import override_forward
from .errors import OffloadError
from .settings import Room
from .store import ExpertStore, MemoryStore

CGROUPS = Path("/sys/fs/cgroup")
MOST_RESERVE, RESERVED_SHARE = 1 << 30, 8


class Slots(NamedTuple):
    """How many experts a device holds at a time, and in words why so many."""

    number: int
    reason: str


def slots_of(
    config: Room, model: PreTrainedModel, layers: Sequence[ExpertLayer], store: ExpertStore, device: torch.device
) -> Slots:
    """The slots for experts of `store`: as many as `config` says, or as fit on `device`.

    What is not on the device yet of the other weights is taken off. Raises `OffloadError` where there is no room for one layer's
    choice, or more are asked for than there are.
    """
    top_k, total, size = layers[0].top_k, sum(layer.stored for layer in layers), store.format.bytes
    if config.expert_memory is not None:
        slots = min(config.expert_memory // size, total)
        if slots < top_k:
            raise OffloadError(
                f"{config.expert_memory:,} bytes hold {slots} experts of {size:,} bytes, and one layer needs {top_k} at a "
                "time; give more expert_memory"
            )
        return Slots(slots, f"{gib(config.expert_memory)} were given for experts")
    if config.slots is not None:
        if not top_k <= config.slots <= total:
            raise OffloadError(
                f"{config.slots} slots are asked for; this model takes from {top_k} (its top k) to {total} (all its experts)"
            )
        return Slots(config.slots, "so many were given")
    if device.type == "cpu" and isinstance(store, MemoryStore):
        return Slots(
            max(2 * top_k, total // 4),
            "a quarter of the experts, since on a CPU slots hold copies of what is in memory",
        )
    return _that_fit(config, model, [layer.experts for layer in layers], size, device, (top_k, total))


def _that_fit(
    config: Room,
    model: PreTrainedModel,
    experts: list[nn.Module],
    size: int,
    device: torch.device,
    bounds: tuple[int, int],
) -> Slots:
    """As many slots as fit, `bounds` being the fewest and the most."""
    fewest, most = bounds
    free = free_memory(device)
    theirs = {parameter for module in experts for parameter in module.parameters(recurse=False)}
    rest = [*model.parameters(), *model.buffers()]
    moved = sum(tensor.nbytes for tensor in rest if tensor not in theirs and tensor.device != device)
    kept = cache_bytes(model.config, config.context, model.dtype)
    reserve = reserve_of(config, free)
    slots = min(most, (free - moved - kept - reserve) // size)
    reason = f"of {gib(free)} free on {device.type}, " + (f"{gib(moved)} are for other weights, " if moved else "")
    reason += f"{gib(kept)} for keys and values of {config.context:,} tokens and {gib(reserve)} in reserve"
    if slots < fewest:
        raise OffloadError(
            f"there is no room for the {fewest} experts of {size:,} bytes that one layer needs at a time: {reason}; free some "
            "memory, give a smaller context or reserve, or quantise the experts"
        )
    return Slots(slots, "all experts fit" if slots == most else f"what fits: {reason}")


def reserve_of(config: Room, free: int) -> int:
    """Bytes to leave for activations: as `config` says, or an eighth of what is free, but no more than 1 GiB."""
    return min(MOST_RESERVE, free // RESERVED_SHARE) if config.reserve is None else config.reserve


def for_batches(config: Room, device: torch.device, tokens: int, size: int) -> dict[str, int]:
    """The settings of `Room` for passes over batches of up to `tokens` tokens, which take `size` bytes of `device` beside the
    default reserve. A reserve that is given is taken as it is."""
    reserve = config.reserve
    return {
        "context": tokens,
        "reserve": reserve_of(config, free_memory(device)) + size if reserve is None else reserve,
    }


def gib(size: float) -> str:
    """A number of bytes in GiB, in words."""
    return f"{size / 2**30:.2f} GiB"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device; on a CPU, of the system, its control group and its own limits."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([psutil.virtual_memory().available, *_left_by_groups(), *_left_by_limits()]))


def _left_by_groups() -> Iterator[int]:
    """What each memory cgroup above this process leaves. What is in its page cache counts as free."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            base = CGROUPS if kinds == "" else CGROUPS / "memory"
            names = (
                ("memory.max", "memory.current") if kinds == "" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            folder = base / path.lstrip("/")
            for group in [folder, *folder.parents]:
                if not group.is_relative_to(base):
                    break
                with suppress(OSError, ValueError):  # it may have no limit, which is a word
                    limit, used = (int((group / name).read_text()) for name in names)
                    yield limit - used + _cached(group)


def _cached(group: Path) -> int:
    """Bytes of files that a cgroup's memory holds, and gives up as they are needed."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))
    return 0


def _left_by_limits() -> Iterator[int]:
    """What the limits on this process's own memory leave."""
    used = psutil.Process().memory_info()
    for kind, held in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - held


def cache_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values (and whatever else is kept) of `tokens` tokens of one sequence, in `dtype`.

    Found on the meta device, from two short texts. Of layers that keep only a window, it counts the whole text.
    """
    made = cache(lambda: skeleton(config).eval())
    try:
        short, long = (ghost_pass(config, length, made).cached for length in (8, 16))
    except (RuntimeError, ValueError):  # what it computes depends on values
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * int(text.num_hidden_layers * heads * width) * tokens * dtype.itemsize
    return (short + (long - short) * max(0, tokens - 8) // 8) * dtype.itemsize


class Ghost(NamedTuple):
    """What a pass on the meta device tells of a model."""

    top_ks: dict[str, int]
    """By the names of its experts modules."""
    cached: int
    """How many numbers its cache holds after the pass."""


_ghosts: dict[tuple[type[PretrainedConfig], str, int], Ghost] = {}
"""The passes that were made, by a config's class and content and the number of tokens. One of a large model takes seconds."""


def ghost_pass(config: PretrainedConfig, tokens: int, make: Callable[[], PreTrainedModel]) -> Ghost:
    """Runs the model of a config on the meta device, without its experts. `make` makes it, and is called if it has not run before.

    Raises `RuntimeError` where what the model computes depends on values.
    """
    key = type(config), config.to_json_string(use_diff=False), tokens
    if key not in _ghosts:
        _ghosts[key] = _ghost(make(), tokens)
    return _ghosts[key]


@torch.no_grad()
def _ghost(model: PreTrainedModel, tokens: int) -> Ghost:
    top_ks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, experts in expert_modules(model).items():

            def forward(x: torch.Tensor, ids: torch.Tensor, *_: Any, name: str = name, **__: Any) -> torch.Tensor:
                top_ks[name] = ids.shape[-1]
                return x

            stack.enter_context(override_forward(experts, forward))
        output = model(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)
    layers = getattr(output[CACHE], "layers", [])
    return Ghost(top_ks, sum(tensor.numel() for layer in layers for tensor in _tensors(vars(layer))))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
