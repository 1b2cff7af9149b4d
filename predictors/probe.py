"""Watches one layer with routed experts during a tiny forward pass, and describes it.

Which norm feeds the router, what the router is called with, and how the experts' sum joins the residual stream. Random numbers
replace the experts' sum, so the pass is cheap even if the experts lie in host memory. The join is the solution of a small linear
system: the layer's output as a sum of the tensors seen.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import ExpertLayer, Join, MoELayer, UnsupportedModelError, first_tensor
from .direct import UnitNorm
from .experts import count_of, identities_of, unmarked
from .override import override_forward
from .routing import read_routing

PROBE_TOKENS = 8


class Seen(NamedTuple):
    """One call of a module in the tiny forward pass."""

    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


def is_routing(output: Any) -> bool:
    """Whether a module returned `(logits, weights, ids)`."""
    return (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(part, torch.Tensor) for part in output)
        and output[2].dtype in (torch.int32, torch.int64)
        and output[1].shape == output[2].shape
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, whatever their shapes and dtypes."""
    return a is b or (
        a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and torch.equal(a.flatten().to(b.dtype), b.flatten())
    )


class Probe:
    """Watches one MoE layer during the tiny forward pass and describes it."""

    def __init__(self, model: PreTrainedModel, experts: str, router: str | None, names: dict[nn.Module, str]):
        """`experts` and `router` are their names in the model; `names` are those of all modules."""
        self.kind, self.names = model.config.model_type, names
        self.factors = [1.0, 0.5, *_numbers(model.config.to_dict())]
        self.name, self.experts = experts, model.get_submodule(experts)
        parents = experts.split(".")[:-1]
        self.block = model.get_submodule(".".join(parents))
        self.router_name = router or ""
        self.router = None if router is None else model.get_submodule(router)
        position = next((i for i, part in enumerate(parents) if re.fullmatch(r"\d+", part)), None)
        if position is None:
            raise UnsupportedModelError(f"{experts} is in no numbered decoder layer")
        self.index = int(parents[position])
        self.decoder = model.get_submodule(".".join(parents[: position + 1]))
        self.seen: list[Seen] = []
        self.router_args: tuple[Any, ...] = ()
        self.routing: Any = None
        self.top_k = 0
        self.x = self.y = self.decoder_input = self.decoder_output = self.block_output = torch.empty(0)
        self.ran_before = 0
        self.dtype = torch.float32

    @contextmanager
    def watching(self) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with suppress(StopIteration, TypeError):  # without a tensor in and out, it is no part of a sum
                self.seen.append(Seen(module, first_tensor((*args, *kwargs.values())), first_tensor(output)))

        def enter_decoder(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen.clear()
            self.decoder_input = first_tensor((*args, *kwargs.values()))

        def enter_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.x, self.ran_before = first_tensor((*args, *kwargs.values())), len(self.seen)

        def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, __, output: setattr(self, name, first_tensor(output))

        def keep_routing(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.router_args, self.routing = (*args, *kwargs.values()), output

        def no_experts(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.dtype = hidden_states.dtype
            self.top_k = self._chosen(hidden_states, (*args, *kwargs.values()))
            generator = torch.Generator().manual_seed(self.index)
            noise = torch.randn(hidden_states.shape, generator=generator, device="cpu")
            # Noise as large as one of the terms that the stream is a sum of: the embedding and one term a layer. Beside much
            # larger noise, a stream in half precision would not be seen.
            size = self.decoder_input.detach().float().std().cpu() / math.sqrt(1 + self.index)
            self.y = (noise * size).to(hidden_states)
            return self.y

        inside = {self.experts} if self.router is None else {self.router, self.experts}
        watched = {*self.decoder.children(), *self.block.children()}
        watched |= {m for m in self.decoder.modules() if not list(m.children()) and m not in self.experts.modules()}
        with ExitStack() as stack:
            for module in watched - inside - {self.block}:
                stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
            pre = self.decoder.register_forward_pre_hook(enter_decoder, with_kwargs=True, prepend=True)
            stack.callback(pre.remove)
            stack.callback(self.block.register_forward_pre_hook(enter_block, with_kwargs=True).remove)
            stack.callback(self.block.register_forward_hook(leave("block_output")).remove)
            stack.callback(self.decoder.register_forward_hook(leave("decoder_output")).remove)
            if self.router is not None:
                stack.callback(self.router.register_forward_hook(keep_routing, with_kwargs=True).remove)
            stack.enter_context(override_forward(self.experts, no_experts))
            yield

    def _chosen(self, x: torch.Tensor, others: tuple[Any, ...]) -> int:
        """How many experts a token goes to, from what they are called with."""
        marks = unmarked(self.experts)
        if marks is not None and marks.is_dense:  # the rows of experts that were not chosen are zeros
            return int((x.view(count_of(self.experts), -1, x.shape[-1]) != 0).any(-1).sum(0).max())
        return int(others[0].shape[-1])

    @property
    def num_experts(self) -> int:
        return count_of(self.experts) + identities_of(self.experts)

    def expert_layer(self) -> ExpertLayer:
        """The layer as far as its experts can be taken one by one."""
        return ExpertLayer(**self._shape())

    def _shape(self) -> dict[str, Any]:
        hidden = self.x.shape[-1]
        return {
            "index": self.index,
            "decoder": self.decoder,
            "experts": self.experts,
            "num_experts": self.num_experts,
            "identities": identities_of(self.experts),
            "top_k": self.top_k,
            "hidden_size": hidden,
            "input_size": self.decoder_input.numel() // (self.x.numel() // hidden),
            "dtype": self.x.dtype,
        }

    def seen_layer(self, why: str) -> MoELayer:
        """The layer as far as its router is seen, `why` its residual can't be followed. Raises `UnsupportedModelError` if it isn't."""
        if self.router is None:
            raise UnsupportedModelError(f"what chooses the experts of {self.name} is no module that could be watched")
        try:
            read_routing(self.routing, self)
        except ValueError as error:
            raise UnsupportedModelError(f"{self.router_name} does not say which experts it chose") from error
        read = self.router_args[0]
        if read.numel() != self.x.numel():
            raise UnsupportedModelError(f"{self.router_name} reads something else than a state for each token")
        return MoELayer(
            **self._shape(),
            block=self.block,
            names={"norm": "", "router": self.router_name, "post_norm": "", "router_arguments": []},
            norm=UnitNorm(),
            router=self.router,
            router_arguments=(),
            router_ndim=read.ndim,
            join=Join(),
            unfollowed=why,
        )

    def moe_layer(self) -> MoELayer:
        """The whole layer. Raises `UnsupportedModelError` where its output can't be followed."""
        if self.router is None:
            raise UnsupportedModelError(f"what chooses the experts of {self.name} is no module that could be watched")
        self._routing()
        norm, h = self._norm()
        join = self._join(h)
        arguments = self._router_arguments()
        return MoELayer(
            **self._shape() | {"attends": not _same(h, self.decoder_input)},
            block=self.block,
            names={
                "norm": self.names.get(norm, ""),
                "router": self.router_name,
                "post_norm": "" if join.post_norm is None else self.names[join.post_norm],
                "router_arguments": list(arguments),
            },
            norm=norm,
            router=self.router,
            router_arguments=tuple(arguments.values()),
            router_ndim=self.router_args[0].ndim,
            join=join,
        )

    def _routing(self) -> tuple[torch.Tensor, ...]:
        r: tuple[torch.Tensor, ...] = self.routing
        if not is_routing(r):
            raise UnsupportedModelError(f"{self.router_name} does not return (logits, weights, ids) for each token")
        if r[0].shape[-1] != self.num_experts:
            raise UnsupportedModelError(
                f"{self.router_name} chooses among {r[0].shape[-1]} and there are {self.num_experts} experts: some choices are no "
                "experts that could be fetched"
            )
        return r

    def _router_arguments(self) -> dict[str, torch.Tensor]:
        """The router's arguments beside its input, by their names in the model."""
        held = {**dict(self.block.named_parameters()), **dict(self.block.named_buffers())}
        prefix = self.router_name.rpartition(".")[0]
        found: dict[str, torch.Tensor] = {}
        for argument in self.router_args[1:]:
            name = next((name for name, tensor in held.items() if tensor is argument), None)
            if name is None:
                raise UnsupportedModelError(
                    f"{self.router_name} reads more than its input and its weights, which no guess can know in time"
                )
            found[f"{prefix}.{name}"] = held[name]
        return found

    def _norm(self) -> tuple[nn.Module, torch.Tensor]:
        """The norm that feeds the block, and its input."""
        if not _same(self.router_args[0], self.x):
            raise UnsupportedModelError(f"{self.router_name} does not read its block's input")
        fed = [seen for seen in self.seen[: self.ran_before] if _same(seen.output, self.x)]
        if fed:  # the last one is the outermost: a norm may contain modules
            return fed[-1].module, fed[-1].input
        # Without a norm, the block reads the residual stream itself.
        return nn.Identity(), self.x

    def _join(self, h: torch.Tensor) -> Join:
        project, y = self._project()
        summed, post_norm = self.block_output, None
        after = [s for s in self.seen[self.ran_before :] if s.module in self.block.children()]
        last = after[-1] if after else None
        if last and last.module is not project and not _same(last.input, self.x) and _same(last.output, summed):
            summed, post_norm = last.input, last.module
        inner = self._solve(summed, "experts", {"experts": y} | self._block_terms(), f"the block of {self.router_name}")
        shared = [key for key in inner if key != "experts"]
        if len(shared) > 1:
            raise UnsupportedModelError(f"the block of {self.router_name} adds more than one shared expert")
        parts: dict[str, Any] = {"project": project, "expert_scale": inner["experts"], "post_norm": post_norm}
        if shared:
            module, gate = shared[0]
            parts |= {"shared": module, "shared_gate": gate, "shared_scale": inner[shared[0]]}
        return self._outer(h, parts)

    def _project(self) -> tuple[nn.Module | None, torch.Tensor]:
        """The module that brings the experts' sum back into the stream's space, or None; and its output."""
        children = set(self.block.children())
        after = [s for s in self.seen[self.ran_before :] if s.module in children and _same(s.input, self.y)]
        if not after or isinstance(after[0].module, nn.Identity):
            return None, self.y
        module = after[0].module
        if not isinstance(module, nn.Linear) or module.bias is not None:
            raise UnsupportedModelError(f"the experts' sum of {self.router_name} goes through {type(module).__name__}")
        return module, after[0].output

    def _block_terms(self) -> dict[Any, torch.Tensor]:
        """Outputs of the block's other modules that may be shared experts, by (module, gate)."""
        children = set(self.block.children())
        ran = [s for s in self.seen[self.ran_before :] if s.module in children and _same(s.input, self.x)]
        gates = [s for s in ran if isinstance(s.module, nn.Linear) and s.module.out_features == 1]
        terms: dict[Any, torch.Tensor] = {}
        for s in ran:
            if s.output.numel() == self.x.numel():
                terms[s.module, None] = s.output
                for gate in gates:
                    product = torch.sigmoid(gate.output.reshape(-1, 1)) * s.output.reshape(-1, s.output.shape[-1])
                    terms[s.module, gate.module] = product
        return terms

    def _outer(self, h: torch.Tensor, parts: dict[str, Any]) -> Join:
        """The join of a layer, given the `parts` of its block: from the block's output to the decoder's."""
        place = f"layer {self.index}"
        children = set(self.decoder.children()) - {self.block}
        fitting = [s.module in children and s.output.numel() == h.numel() for s in self.seen]
        ran = list(zip(self.seen, fitting, strict=True))
        late = {s.module: s for s, fits in ran[self.ran_before :] if fits}
        before = {s.module: s.output for s, fits in ran[: self.ran_before] if fits and s.module not in late}
        norms = {m: s for m, s in late.items() if parts["post_norm"] is None and _same(s.input, self.block_output)}
        shared = {m: s for m, s in late.items() if "shared" not in parts and _same(s.input, self.x)}
        experts: dict[Any, torch.Tensor] = {"block": self.block_output} | {m: s.output for m, s in norms.items()}
        stream: dict[Any, torch.Tensor] = {"stream": h} | ({} if _same(h, self.x) else {"normed": self.x})
        for key, term in experts.items():
            others = stream | {m: s.output for m, s in shared.items()} | before
            try:
                found = self._solve(self.decoder_output, key, {key: term} | others, place)
            except UnsupportedModelError:
                continue
            base = [k for k in ("stream", "normed") if k in found]
            beyond = [m for m in shared if m in found]
            if len(base) != 1 or len(beyond) > 1:
                break
            if key != "block":
                parts |= {"post_norm": key}
            if beyond:
                if parts["post_norm"] is not None:
                    break
                parts |= {"shared": beyond[0], "shared_scale": found[beyond[0]] / found[key]}
            return Join(
                base_is_normed=base[0] == "normed",
                base_scale=found[base[0]],
                beside=tuple((m, found[m]) for m in before if m in found),
                post_scale=found[key],
                **parts,
            )
        raise self._not_a_sum(place)

    def _solve(self, output: torch.Tensor, needed: Any, terms: dict[Any, torch.Tensor], place: str) -> dict[Any, float]:
        """The factors with which `output` is a sum of the fewest of `terms`, `needed` among them.

        The smallest subset that fits is taken, because some terms are sums of others.
        """
        if any(t.numel() != output.numel() for t in terms.values()):
            raise self._not_a_sum(place)
        target = output.detach().double().cpu().flatten()
        matrix = torch.stack([term.detach().double().cpu().flatten() for term in terms.values()], dim=-1)
        tolerance = max(1e-4, 4 * torch.finfo(output.dtype).eps)
        keys = list(terms)
        for size in range(len(keys)):
            for others in itertools.combinations([i for i, key in enumerate(keys) if key != needed], size):
                subset = [keys.index(needed), *others]
                columns = matrix[:, subset]
                factors = torch.linalg.lstsq(columns, target.unsqueeze(-1), driver="gelsd").solution.flatten()
                if float((columns @ factors - target).norm()) <= tolerance * float(target.norm()):
                    return {keys[i]: self._snap(float(f), tolerance) for i, f in zip(subset, factors, strict=True)}
        raise self._not_a_sum(place)

    def _snap(self, factor: float, tolerance: float) -> float:
        """The config's own number if `factor` equals one: the solution is exact only up to rounding."""
        return next((k for k in self.factors if k and math.isclose(k, factor, rel_tol=10 * tolerance)), factor)

    def _not_a_sum(self, place: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{place} of {self.kind} does not add its experts' sum to the residual stream in a way "
            "that a guess could follow (convolved, mixed over several streams, or gated by what comes later)"
        )


def _numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, float):
        yield values
