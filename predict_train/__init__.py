"""The one name to import. The rooms are its subpackages:

    predict_train.predictors        predict_train.train
    predict_train.data_collection   predict_train.runtime

So a user's own train.py or runtime.py is never mistaken for ours.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predictors.checkpoint import load_predictors
    from .runtime.load import load_experts, load_offloaded
    from .runtime.offload import offload_experts, offloaded

_HERE = Path(__file__).parent
if not (_HERE / "predictors").exists():  # installed, the rooms lie in this folder; in a checkout, beside it
    __path__.append(str(_HERE.parent))

_PLACES = {
    "load_predictors": "predictors.checkpoint",
    "load_experts": "runtime.load",
    "load_offloaded": "runtime.load",
    "offload_experts": "runtime.offload",
    "offloaded": "runtime.offload",
}
__all__ = ["load_experts", "load_offloaded", "load_predictors", "offload_experts", "offloaded"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds to import, and the command line's help does not need it.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
