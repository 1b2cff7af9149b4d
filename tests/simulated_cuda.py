"""A CUDA device that is not there: tensors that say they are on `cuda:0`, on which work is done late and in any legal order.

Operations go into the queues of streams (see `simulated_streams`). Memory that nobody has written to yet is poisoned, and so is
memory that was freed. So what is read too early or too late shows in the results. As on CUDA, the host waits for some copies, and
not for those to and from registered memory, which here is what the tests' `Cudart` has registered.

Nothing here is fast. With one thread a run is the same for the same seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import pytest
import torch
from pages import CPU, CUDA, Cudart
from predict_train.runtime.device import slots
from simulated_streams import Device, Event, Plan, Stream
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def poison(memory: torch.Tensor) -> torch.Tensor:
    """Writes what shows in results: not a number, or an index that is in range and mostly wrong."""
    poisons = {torch.bool: True, torch.uint8: 0xFF}  # floats of such bytes are not numbers
    return memory.fill_(float("nan") if memory.is_floating_point() else poisons.get(memory.dtype, 0))


class Memory:
    """The memory of a tensor and of its views. When it is freed, it is used for the next tensor that its stream makes."""

    def __init__(self, content: torch.Tensor):
        self._content, self._stream = content, Device.present.entered[-1]
        while self._stream.freed:
            self._stream.put(partial(poison, self._stream.freed.pop()))

    def __del__(self) -> None:
        self._stream.freed.append(self._content)


ORDINARY = nullcontext()


class SimulatedTensor(torch.Tensor):
    """A tensor on the device. To torch's C++ it is on `meta`, which needs no device. To Python it is on `cuda:0`."""

    content: torch.Tensor
    """What the device has written to it so far."""
    memory: Memory

    @staticmethod
    def __new__(cls, content: torch.Tensor, memory: Memory | None = None) -> Self:
        size, strides, offset = content.size(), content.stride(), content.storage_offset()
        # A view must be as ordinary as what it is a view of.
        with torch._C._InferenceMode(False) if torch.is_inference_mode_enabled() else ORDINARY:
            made = torch.Tensor._make_wrapper_subclass(
                cls, size, strides=strides, storage_offset=offset, dtype=content.dtype, device="meta"
            )
        made.content, made.memory = content, Memory(content) if memory is None else memory
        return made

    device = property(lambda self: CUDA)  # noqa: ARG005
    is_cuda = property(lambda self: True)  # noqa: ARG005
    is_cpu = is_meta = property(lambda self: False)  # noqa: ARG005

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Within it tensors can be made on the device, and moved there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to keep the compiler out of each operation takes longer than many of them."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


EMPTY = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default,
         aten.new_empty_strided.default}  # fmt: skip
ANSWERS = {aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default}
"""The host waits in them, since they return a number."""
WAITING = ANSWERS | {aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten._unique2.default}
"""The host waits in them, since it needs the sizes of what they return."""
BRANCHED = (tuple, list, dict)
SHAPES: dict[Any, Any] = {}
"""What operations return for arguments of some shapes and values: tensors on `meta`."""


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Does an operation on host memory, or gives it to the device."""
    to, leaves = kwargs.get("device"), leaves_of((args, kwargs))
    is_ours = any(isinstance(leaf, SimulatedTensor) for leaf in leaves)
    on_device = to is not None and to.type in ("cuda", "meta")  # C++ asks for meta where it sees a tensor of ours
    if (is_ours or on_device) and torch.is_inference_mode_enabled() and func._can_decompose():
        with Mode():  # where autograd is not quite off, it has done this already
            return func.decompose(*args, **kwargs)
    with torch._C._DisableTorchDispatch():
        if not (is_ours or on_device):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return moved(args[0], on_device or to is None, kwargs)
        if func is aten.copy_.default:
            return copied(*args, **kwargs)
        return operated(func, args, kwargs, leaves, on_device)


def operated(func: Any, args: Any, kwargs: Any, leaves: list[Any], on_device: bool) -> Any:
    """Gives the device an operation that is no copy."""
    indices = args[1] if func is aten.index.Tensor else []
    if any(is_host(leaf) and leaf.dim() and not any(leaf is index for index in indices) for leaf in leaves):
        raise RuntimeError(f"{func} got tensors on cuda:0 and cpu")
    real_args, real_kwargs = mapped(content, (args, kwargs))
    real_kwargs |= {"device": CPU} if on_device else {}
    if func in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
        Device.present.drain(str(func))
        found = func(*real_args, **real_kwargs)
        return found if func in ANSWERS else mapped(SimulatedTensor, found)
    declared = func._schema.arguments
    written = [i for i, argument in enumerate(declared) if argument.alias_info and argument.alias_info.is_write]
    if written:
        Device.present.entered[-1].put(lambda: func(*real_args, **real_kwargs))
        outputs = [args[i] if i < len(args) else kwargs[declared[i].name] for i in written]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    is_view = any(result.alias_info is not None for result in func._schema.returns)
    if is_view or func in (aten._unsafe_view.default, aten.lift_fresh.default):
        memory = next((leaf.memory for leaf in leaves if isinstance(leaf, SimulatedTensor)), None)
        return mapped(lambda view: SimulatedTensor(view, memory), func(*real_args, **real_kwargs))
    if func in EMPTY:
        return SimulatedTensor(poison(func(*real_args, **real_kwargs)))
    return computed(func, (args, kwargs), (real_args, real_kwargs))


def computed(func: Any, arguments: Any, real: Any) -> Any:
    """The new tensors of an operation. Their shapes are known at once, and their values when the device comes to them."""
    key = func, mapped(signature, (arguments[0], *arguments[1].items()))
    if key not in SHAPES:
        args, kwargs = mapped(shape_of, arguments)
        SHAPES[key] = func(*args, **kwargs)
    found = mapped(new_like, SHAPES[key])
    made = leaves_of(found)

    def work() -> None:
        for into, value in zip(made, leaves_of(func(*real[0], **real[1])), strict=True):
            if into.numel():  # a CPU adds what only its gradients read
                into.copy_(value)

    Device.present.entered[-1].put(work)
    return mapped(SimulatedTensor, found)


def moved(source: torch.Tensor, to_device: bool, kwargs: Any) -> torch.Tensor:
    """`source.to(...)`: to another device or another dtype."""
    layout = kwargs.get("memory_format") or torch.preserve_format
    into = torch.empty_like(content(source), dtype=kwargs.get("dtype"), memory_format=layout, device=CPU)
    target = SimulatedTensor(poison(into)) if to_device else into
    return copied(target, source, kwargs.get("non_blocking", False))


def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)`. Between host and device the host waits, unless the caller allows it to go on and CUDA can do so."""
    into, values = content(target), content(source)
    host = next((tensor for tensor in (target, source) if is_host(tensor)), None)
    is_done_later = host is None or (non_blocking and Device.present.can_read(host))
    if host is source and not is_done_later:
        values = values.clone()  # it has left the host's memory when the call returns
    if host is target and is_done_later:
        poison(into)
    Device.present.entered[-1].put(lambda: into.copy_(values))
    if not is_done_later and not (host is source and non_blocking):
        Device.present.drain("copy")
    return target


def launch(kernel: Callable[..., object], *arguments: Any) -> None:
    """Has the device call `kernel` with what is in the arguments' memory then. Without tensors of a device it is called at once."""
    if not any(isinstance(argument, SimulatedTensor) for argument in arguments):
        kernel(*arguments)
        return
    assert all(Device.present.can_read(tensor) for tensor in filter(is_host, arguments)), "it is not registered"
    real = mapped(content, arguments)
    Device.present.entered[-1].put(lambda: kernel(*real))


def content(leaf: Any) -> Any:
    return leaf.content if isinstance(leaf, SimulatedTensor) else leaf


def is_host(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, SimulatedTensor)


def shape_of(leaf: Any) -> Any:
    """What torch needs to know how large a result will be."""
    if isinstance(leaf, torch.Tensor) and (leaf.dim() or not is_host(leaf)):
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def new_like(shape: torch.Tensor) -> torch.Tensor:
    return poison(torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype))


def signature(leaf: Any) -> Any:
    """All that the shape of a result depends on."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, is_host(leaf)
    return type(leaf), leaf  # 1 and 1.0 and True are equal


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with each leaf replaced. Torch's own trees know more and take most of the time of a test."""
    if isinstance(tree, dict):
        return {name: mapped(function, branch) for name, branch in tree.items()}
    if not isinstance(tree, BRANCHED):
        return function(tree)
    # Most branches are leaves: no call of this function for each of them.
    return tuple([mapped(function, branch) if isinstance(branch, BRANCHED) else function(branch) for branch in tree])


def leaves_of(tree: Any) -> list[Any]:
    if not isinstance(tree, BRANCHED):
        return [tree]
    found: list[Any] = []
    for branch in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(branch, BRANCHED):
            found += leaves_of(branch)
        else:
            found.append(branch)
    return found


def data_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """`tensor.data = data`, also where this moves it to the device or back."""
    if is_host(tensor) and is_host(data):
        torch._C.TensorBase.data.__set__(tensor, data)
        return
    new = data.detach()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)


@contextmanager
def simulated(plan: Plan, seed: int = 0, lockable: int = 1 << 40) -> Iterator[Device]:
    """A machine with this device, for the length of a `with`. It registers at most `lockable` bytes of host memory."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device(plan, seed, Cudart(patch, lockable, CUDA))
        patch.setattr(Device, "present", device, raising=False)
        first = Stream()
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: stream,
            "current_stream": lambda _=None: device.entered[-1],
            "synchronize": device.synchronize,
            "device": lambda _: nullcontext(),
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "mem_get_info": lambda _=None: (1 << 40, 1 << 40),
            "reset_peak_memory_stats": lambda _=None: None,
            "max_memory_allocated": lambda _=None: 0,
            "graph_pool_handle": lambda: (0, 0),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Stream", Stream)
        patch.setattr(slots, "_idle", defaultdict(list))
        patch.setattr(torch.accelerator, "current_stream", lambda _=None: device.entered[-1])
        patch.setattr(torch.accelerator, "synchronize", device.synchronize)
        patch.setattr(torch.Tensor, "data", property(data_of, set_data), raising=False)
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=...) would not come to the mode
        try:
            with Mode():
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            assert device.entered == [first]
