"""The recorder: hooks on a full run of a model, which read everything that predictors learn from.

Nothing is computed twice, except for the control: it feeds each target's norm and router with their recorded true input
again and must find exactly the experts that the model used. It does so for all tokens of the first pass, then for every
eighth; then it runs the router again only if the norm's output differs from the router's recorded input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..predictors.architecture import MoELayer, first_tensor, sources
from ..predictors.experts import Groups, OnOutputs, expert_parameters, run_experts
from ..predictors.metrics import HitRate
from ..predictors.override import override_forward
from ..predictors.routing import Routing, read_routing
from ..predictors.speculation import Router

CONTROL_STRIDE = 8

Watch = Callable[[MoELayer, OnOutputs], AbstractContextManager[Any]]
"""Has a layer's experts tell their outputs, for the length of a `with`."""


@contextmanager
def watch_resident(layer: MoELayer, on_outputs: OnOutputs) -> Iterator[None]:
    """Watches experts whose weights are in their module. Raises `UnsupportedModelError` if they can't be run one by one."""
    expert_parameters(layer.experts)

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        # Models name the three arguments differently, but their order is the same.
        x, ids, weights = (*args, *kwargs.values())
        return run_experts(layer.experts, x, ids, weights, on_outputs)

    with override_forward(layer.experts, run):
        yield


class OverflowingExpertError(ArithmeticError):
    """An expert gave a value that is not finite."""

    def __init__(self, layer: int, expert: int, row: int):
        super().__init__(f"expert {expert} of layer {layer}, row {row}")
        self.layer, self.expert = layer, expert
        self.row = row
        """Of the pass, recorded or not."""


class LayerRecord(NamedTuple):
    """What one MoE layer did in one forward pass. Tensors are on the model's device and in its dtypes."""

    residual: torch.Tensor
    """`[tokens, hidden]`: all of the layer's output but its routed experts."""
    routing: Routing
    """As the model itself used it."""
    input: torch.Tensor | None
    """`[tokens, hidden]`: the decoder layer's own input, for a target without a source or if inputs are asked for."""
    inner: torch.Tensor | None
    """`[tokens, hidden]`: the shared term that goes through the post-norm with the experts' sum, or None."""


class Recorder:
    """Records the forward passes of a model between `__enter__` and `__exit__`, which restores the model exactly.

    `targets` are indices of MoE layers among `layers`. Each target's source layer is recorded too, and with `inputs`
    every target's own input. Default vectors are those of all sources, also of other targets: at inference every layer
    is guessed. Entering raises `UnsupportedModelError` if the experts can't be run one by one.

    `watch` tells the outputs of experts; with weights that are elsewhere than in their module, whoever has them gives it.
    """

    def __init__(
        self, layers: list[MoELayer], targets: Iterable[int], inputs: bool = False, watch: Watch = watch_resident
    ):
        before = sources(layers)
        self.sources: dict[int, int | None] = {target: before[target] for target in sorted(targets)}
        """The source layer of each target."""
        read, sources_of_any = set(self.sources.values()), set(before.values())
        self._taps: dict[int, _Tap] = {}
        """Of the recorded layers."""
        self._sums: dict[int, _Sums] = {}
        """Of all source layers."""
        for layer in layers:
            index = layer.index
            if index in read or index in self.sources:
                keeps_input = index in self.sources and (inputs or self.sources[index] is None)
                self._taps[index] = _Tap(layer, index in read, keeps_input)
            if index in sources_of_any and layer.unfollowed is None:
                self._sums[index] = _Sums(layer, watch)
        self._choices = {
            layer.index: torch.zeros(layer.num_experts, dtype=torch.int64)
            for layer in layers
            if layer.index in self.sources and layer.unfollowed is not None
        }
        """By target that can't be followed: how often each expert was chosen."""
        self._parts: list[_Tap | _Sums] = [*self._taps.values(), *self._sums.values()]
        self._control = HitRate(len(self.sources))
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            for part in self._parts:
                part.attach(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, mask: torch.Tensor | None) -> None:
        """In the passes to come, records only the tokens where `mask` (bool `[tokens]`) is set; None records all."""
        for part in self._parts:
            # On each layer's own device: a large model may be spread over several.
            part.keep = None if mask is None else mask.to(next(part.layer.router.parameters()).device)

    def take(self) -> dict[int, LayerRecord]:
        """The records of the last forward pass, by layer index; the recorder does not keep them."""
        recomputed, used = [], []
        stride = CONTROL_STRIDE if self._control.total else 1
        for target in self.sources:
            tap = self._taps[target]
            recomputed.append(tap.recomputed_ids(stride).cpu())
            used.append(tap.routing.ids[::stride].cpu())
            if target in self._choices:
                chosen = tap.routing.ids.flatten().cpu()
                self._choices[target] += torch.bincount(chosen, minlength=tap.layer.num_experts)
        self._control.update(torch.stack(recomputed), torch.stack(used))
        return {index: tap.take() for index, tap in self._taps.items()}

    def first_not_finite(self) -> tuple[int, int] | None:
        """The first recorded layer whose norm read something not finite in the last pass, and the first such row of the
        pass, recorded or not; or None. To be called before `take`."""
        for index, tap in self._taps.items():
            rows = (~tap.seen[tap.read].flatten(0, -2).isfinite()).any(-1).nonzero()
            if len(rows):
                return index, int(rows[0])
        return None

    def control_hit_rates(self) -> dict[int, float]:
        """By target: how often norm and router, given their recorded input again, find the experts used. It must be 1.0."""
        return dict(zip(self.sources, self._control.rates(), strict=True))

    def state(self) -> dict[str, torch.Tensor]:
        """CPU copies of the sums over all passes so far, which default vectors and control are computed from.

        `sums.<layer>` `[experts, hidden]` fp32, `counts.<layer>` and `choices.<layer>` `[experts]` int64, `control.hits` `[targets]` and
        `control.total` `[]` fp64.
        """
        state = {"control.hits": self._control.hits.clone(), "control.total": self._control.total.clone()}
        for index, own in self._sums.items():
            state[f"sums.{index}"] = own.sums.to("cpu", copy=True)
            state[f"counts.{index}"] = own.counts.clone()
        return state | {f"choices.{index}": counts.clone() for index, counts in self._choices.items()}

    def add_state(self, state: dict[str, torch.Tensor]) -> None:
        """Adds the sums of another recorder of the same layers; a new recorder then continues that one."""
        self._control.hits += state["control.hits"]
        self._control.total += state["control.total"]
        for index, own in self._sums.items():
            own.sums += state[f"sums.{index}"].to(own.sums.device)
            own.counts += state[f"counts.{index}"]
        for index, counts in self._choices.items():
            counts += state[f"choices.{index}"]

    def choices(self) -> dict[int, torch.Tensor]:
        """By target that can't be followed: how often each expert was chosen, `[experts]`, int64."""
        return self._choices

    def default_vectors(self) -> dict[int, torch.Tensor]:
        """By source layer: `[experts, hidden]`, fp32, on the CPU; the row of an expert without tokens is zero."""
        return {index: own.means() for index, own in self._sums.items()}


class _Sums:
    """Adds up what each expert of one MoE layer gives."""

    def __init__(self, layer: MoELayer, watch: Watch):
        self.layer, self.watch = layer, watch
        self.sums = torch.zeros(layer.num_experts, layer.hidden_size)
        self.counts = torch.zeros(layer.num_experts, dtype=torch.int64)
        self.keep: torch.Tensor | None = None

    def attach(self, stack: ExitStack) -> None:
        stack.enter_context(self.watch(self.layer, self.add))

    def add(self, groups: Groups, outputs: torch.Tensor) -> None:
        """Adds the outputs of one pass."""
        self.sums = self.sums.to(outputs.device)
        sizes, rows = groups.sizes, groups.order // groups.choices
        if self.keep is not None:
            kept = self.keep[rows]
            outputs, rows = outputs[kept], rows[kept]
            sizes = [int(part.sum()) for part in kept.cpu().split(sizes)]
        sums = torch.stack([part.sum(0, dtype=torch.float32) for part in outputs.split(sizes)])
        if not sums.sum().isfinite():
            self.refuse(groups.experts, rows.split(sizes), outputs.split(sizes))
        self.sums[torch.tensor(groups.experts, device=outputs.device)] += self.layer.join.in_stream(sums)
        self.counts[groups.experts] += torch.tensor(sizes)

    def refuse(self, experts: list[int], rows: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Raises `OverflowingExpertError` naming the first row with an output that is not finite, if there is one."""
        found = []
        for expert, own, output in zip(experts, rows, outputs, strict=True):
            if len(wrong := own[(~output.isfinite()).any(-1)]):
                found.append((int(wrong.min()), expert))
        if found:
            row, expert = min(found)
            raise OverflowingExpertError(self.layer.index, expert, row)

    def means(self) -> torch.Tensor:
        """`[experts, hidden]`, fp32, on the CPU."""
        return self.sums.cpu() / self.counts.float().clamp(min=1).unsqueeze(-1)


class _Tap:
    """The hooks on one MoE layer and the tensors that they saw."""

    def __init__(self, layer: MoELayer, is_source: bool, keeps_input: bool):
        self.layer, self.is_source, self.keeps_input = layer, is_source, keeps_input
        self.seen: dict[str, torch.Tensor] = {}
        self.read = "norm_input" if layer.unfollowed is None else "router_input"
        """What is recorded as the residual, before anything is added to it."""
        self.routing: Routing
        self.again: torch.Tensor
        """What the router chooses if it is called again, `[tokens, top_k]`; only of a layer that is not followed."""
        self.keep: torch.Tensor | None = None

    def attach(self, stack: ExitStack) -> None:
        layer = self.layer

        def keep_input(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.seen[name] = first_tensor((*args, *kwargs.values()))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def keep_output(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self.seen[name] = first_tensor(output)

            stack.callback(module.register_forward_hook(hook).remove)

        def read(output: Any) -> Routing:
            return Routing(*(self._kept(part) for part in read_routing(output, layer)))

        def keep_routing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.routing = read(output)
            if (
                layer.unfollowed is not None
            ):  # it may read more than its input, so it is called again while that is known
                self.again = read(module.forward(*args, **kwargs)).ids

        if layer.unfollowed is None:
            keep_input("norm_input", layer.entry)
        keep_input("router_input", layer.router)
        stack.callback(layer.router.register_forward_hook(keep_routing, with_kwargs=True).remove)
        if self.keeps_input:
            keep_input("decoder_input", layer.decoder)
        if self.is_source and layer.unfollowed is None:
            join = layer.join
            if join.base_is_normed:
                keep_input("block_input", layer.block)
            for number, (module, _) in enumerate(join.beside):
                keep_output(f"beside.{number}", module)
            for name, part in (("shared", join.shared), ("shared_gate", join.shared_gate)):
                if part is not None:
                    keep_output(name, part)

    def recomputed_ids(self, stride: int) -> torch.Tensor:
        """The choice of norm and router on every `stride`-th recorded row of the stream, `[tokens, top_k]`. With a
        stride above 1 the router is not run again if its input is exactly the recorded one."""
        if self.layer.unfollowed is not None:
            return self.again[::stride]
        # `forward` does not call the hooks: a recomputation must not be recorded.
        normed = self.layer.norm.forward(self._kept(self.seen["norm_input"])[::stride])
        if stride > 1 and torch.equal(normed, self._kept(self.seen["router_input"])[::stride]):
            return self.routing.ids[::stride]
        return Router.of(self.layer)(normed).ids

    def take(self) -> LayerRecord:
        if "decoder_input" in self.seen:
            self.seen["decoder_input"] = self.layer.own_input(self.seen["decoder_input"])
        kept = {n: self._kept(tensor) for n, tensor in self.seen.items() if n == self.read or n != "router_input"}
        self.seen.clear()
        residual, inner = kept[self.read], None
        if self.is_source and self.layer.unfollowed is None:
            join = self.layer.join
            beside = [kept[f"beside.{number}"] for number in range(len(join.beside))]
            shared = join.scaled(kept["shared"], kept.get("shared_gate")) if "shared" in kept else None
            residual, inner = join.residual(residual, kept.get("block_input", residual), beside, shared)
        routing = self.routing
        del self.routing
        return LayerRecord(residual, routing, kept.get("decoder_input"), inner)

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """The rows `[tokens, ...]` to record of `x` `[..., n]`."""
        rows = x.flatten(0, -2)
        return rows if self.keep is None else rows[self.keep]
