"""Finds the MoE layers of a transformers model, without a table of models.

The model's own `_can_record_outputs` names the class of its routers, and the block that holds a router holds its
experts. Older releases of transformers leave that class out for some types: then the router is found by its output.

The rest is found by one tiny forward pass: which norm feeds the router, what the router is called with, and how the
experts' sum joins the residual stream. Random numbers replace the experts' sum, so the pass is cheap even if the
experts lie in host memory. The join is the solution of a small linear system: the layer's output as a sum of the
tensors seen.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .architecture import Join, MoELayer, UnsupportedModelError, first_tensor
from .experts import expert_modules
from .override import override_forward

PROBE_TOKENS = 8


class Seen(NamedTuple):
    """One call of a module in the tiny forward pass."""

    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The MoE layers of a causal language model, in forward order.

    Raises `UnsupportedModelError` for a dense model, and if routers or experts don't have the form described in
    `MoELayer`.
    """
    kind = model.config.model_type
    routers = _routers(model)
    if not routers:
        raise UnsupportedModelError(
            f"{kind} is not a mixture-of-experts model that transformers {transformers.__version__} knows the routers of; "
            "speculating experts needs one"
        )
    names = {module: name for name, module in model.named_modules()}
    factors = [1.0, 0.5, *_numbers(model.config.to_dict())]
    probes = [_Probe(model, name, names, factors) for name in routers]
    with ExitStack() as stack, torch.no_grad():
        order: list[int] = []
        for number, probe in enumerate(probes):
            stack.enter_context(probe.watching())
            handle = probe.router.register_forward_pre_hook(lambda *_, number=number: order.append(number))
            stack.callback(handle.remove)
        _tiny_pass(model)
    found = [probes[number].result() for number in dict.fromkeys(order)]
    if len({(layer.num_experts, layer.top_k, layer.hidden_size) for layer in found}) > 1:
        raise UnsupportedModelError(f"the MoE layers of {kind} differ in shape; one that is the same in all is needed")
    return found


def _tiny_pass(model: PreTrainedModel) -> None:
    """Runs a few tokens in evaluation mode, without a cache."""
    was_training = model.training
    embedding = model.get_input_embeddings()
    vocabulary = min(PROBE_TOKENS + 3, model.config.get_text_config().vocab_size)
    device = next(embedding.parameters()).device
    token_ids = torch.arange(vocabulary - PROBE_TOKENS, vocabulary, device=device).unsqueeze(0)
    try:
        model.eval()
        model(input_ids=token_ids, use_cache=False)
    finally:
        model.train(was_training)


def _routers(model: PreTrainedModel) -> list[str]:
    """The names of the model's routers, in no particular order."""
    classes = _router_classes(model)
    named = [name for name, module in model.named_modules() if classes and isinstance(module, classes)]
    experts = {name.rpartition(".")[0]: module for name, module in expert_modules(model).items()}
    if not experts or any(name.rpartition(".")[0] in experts for name in named):
        return named
    found: set[str] = set()

    def keep(name: str, output: Any) -> None:
        if _is_routing(output):
            found.add(name)

    with ExitStack() as stack, torch.no_grad():
        for block, module in experts.items():
            stack.enter_context(
                override_forward(module, lambda hidden_states, *_, **__: torch.zeros_like(hidden_states))
            )
            for name, child in model.get_submodule(block).named_children():
                handle = child.register_forward_hook(lambda _, __, output, name=f"{block}.{name}": keep(name, output))
                stack.callback(handle.remove)
        _tiny_pass(model)
    return list(found)


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    classes: list[type] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                classes.append(getattr(recorder, "target_class", None) or recorder)
    return tuple(classes)


def _is_routing(output: Any) -> bool:
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


class _Probe:
    """Watches one MoE layer during the tiny forward pass and describes it."""

    def __init__(self, model: PreTrainedModel, router_name: str, names: dict[nn.Module, str], factors: list[float]):
        self.kind, self.names, self.factors = model.config.model_type, names, factors
        self.router_name, self.router = router_name, model.get_submodule(router_name)
        parents = router_name.split(".")[:-1]
        self.block = model.get_submodule(".".join(parents))
        experts = [m for m in self.block.children() if any(p.ndim == 3 for p in m.parameters(recurse=False))]
        if len(experts) != 1:
            raise UnsupportedModelError(
                f"{router_name} has no experts beside it that are stacked in one module; they can't be addressed one by one"
            )
        self.experts = experts[0]
        position = next((i for i, part in enumerate(parents) if re.fullmatch(r"\d+", part)), None)
        if position is None:
            raise UnsupportedModelError(f"{router_name} is in no numbered decoder layer")
        self.index = int(parents[position])
        self.decoder = model.get_submodule(".".join(parents[: position + 1]))
        self.seen: list[Seen] = []
        self.router_args: tuple[Any, ...] = ()
        self.routing: Any = None
        self.x = self.y = self.decoder_input = self.decoder_output = self.block_output = torch.empty(0)
        self.ran_before = 0

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

        def no_experts(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.index)
            noise = torch.randn(hidden_states.shape, generator=generator, device="cpu")
            # Noise as large as one of the terms that the stream is a sum of: the embedding and one term a layer. Beside much
            # larger noise, a stream in half precision would not be seen.
            size = self.decoder_input.detach().float().std().cpu() / math.sqrt(1 + self.index)
            self.y = (noise * size).to(hidden_states)
            return self.y

        inside = {self.router, self.experts}
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
            stack.callback(self.router.register_forward_hook(keep_routing, with_kwargs=True).remove)
            stack.enter_context(override_forward(self.experts, no_experts))
            yield

    def result(self) -> MoELayer:
        routing = self._routing()
        norm, h = self._norm()
        join = self._join(h)
        arguments = self._router_arguments()
        return MoELayer(
            index=self.index,
            decoder=self.decoder,
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
            experts=self.experts,
            join=join,
            attends=not _same(h, self.decoder_input),
            num_experts=routing[0].shape[-1],
            top_k=routing[2].shape[-1],
            hidden_size=self.x.shape[-1],
            dtype=self.x.dtype,
        )

    def _routing(self) -> tuple[torch.Tensor, ...]:
        r: tuple[torch.Tensor, ...] = self.routing
        if not _is_routing(r):
            raise UnsupportedModelError(f"{self.router_name} does not return (logits, weights, ids) for each token")
        stacked = next(p for p in self.experts.parameters(recurse=False) if p.ndim == 3).shape[0]
        if r[0].shape[-1] != stacked:
            raise UnsupportedModelError(
                f"{self.router_name} chooses among {r[0].shape[-1]} and there are {stacked} experts: some choices are no "
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
