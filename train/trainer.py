"""Lightning's trainer as `fit` uses it: which strategies it may have, and what it must not print, catch or leave half-written."""

from __future__ import annotations

import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ..predictors.files import written_whole
from .data import FitError
from .settings import FitConfig


def lightning_trainer(config: FitConfig, device: torch.device, **arguments: Any) -> lightning.Trainer:
    """Raises `FitError` if Lightning can't train with the strategy, devices and nodes of `config`."""
    is_cuda, callbacks = device.type == "cuda", [*arguments.pop("callbacks"), OwnSigterm()]
    alone = config.devices == config.num_nodes == 1
    try:
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            accelerator="gpu" if is_cuda else "cpu",
            devices=[device.index or 0] if is_cuda and alone else config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=precision_of(config.precision, device),
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,  # each epoch has another order
            use_distributed_sampler=False,  # `TraceBlocks` does it
            enable_model_summary=False,
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            **arguments,
        )
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        raise FitError(
            f"Lightning can't train with strategy {config.strategy}, {config.devices} devices and {config.num_nodes} nodes "
            f"({first_sentence(error)}); give another --strategy, --devices or --num-nodes"
        ) from error
    is_plain = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
    # Other launchers train in copies of this process, which then knows nothing of it.
    if not is_plain or not isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher | None):
        raise FitError(
            f"the strategy {config.strategy} leaves no process with the whole result; give --strategy auto or ddp"
        )
    return trainer


def first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")


def precision_of(asked: str, device: torch.device) -> Any:
    """Lightning's name of the precision `asked`; `auto` is the fastest that the device has instructions for."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    # Without these instructions, bfloat16 on a CPU is slower than fp32; torch has no public way to ask.
    supported = (getattr(torch.cpu, f"_is_{kind}_supported", lambda: False) for kind in ("avx512_bf16", "amx_tile"))
    return "bf16-mixed" if any(ask() for ask in supported) else "32-true"


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's messages on devices, workers and folders: the user can't act on them. Errors of the disk in
    TensorBoard's thread, which are raised again in this one, are hidden too."""
    hook = threading.excepthook
    threading.excepthook = lambda caught: None if issubclass(caught.exc_type, OSError) else hook(caught)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        threading.excepthook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OwnSigterm(Callback):
    """Keeps the command line's answer to SIGTERM: Lightning's has the process wait for the others, which may never answer."""

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *_: Any) -> None:  # Lightning has just put its own there
        if callable(self.handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all: Lightning's own way leaves a part of it if the disk is full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path)) as aside:
            aside.write_bytes(content.getbuffer())
