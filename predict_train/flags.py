"""Makes a command from a configuration class: a flag for each field, with the field's docstring and default as help."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from .predictors.errors import StoppedError, lack_of_memory
from .predictors.settings import TIMES, Kind, Settings, flag, load_config

S = TypeVar("S", bound=Settings)

FILE = typer.Option(
    help="YAML file of settings; flags beat it, and it beats the defaults.", metavar="<path>", show_default=False
)


def command(app: typer.Typer) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
    """Adds a job to `app`, with its name, its docstring, and a flag for each field of its parameter's class.

    The class checks the flags' text; a flag that is not given is left to the file and the defaults.
    """

    def add(job: Callable[[S], None]) -> Callable[[S], None]:
        [kind] = [found for name, found in get_type_hints(job).items() if name != "return"]

        def run(config: Path | None, **flags: Any) -> None:
            given = {key: flags[name] for name, key in kind.keys().items()}
            try:
                job(load_config(kind, config, {key: None if value == [] else value for key, value in given.items()}))
            except KeyboardInterrupt as stop:
                raise StoppedError(stop) from stop
            except (MemoryError, RuntimeError) as error:
                if (told := lack_of_memory(error)) is None:
                    raise
                raise told from error

        hints = {name: _hint(kind, name) for name in _ordered(kind)} | {"config": Annotated[Path | None, FILE]}
        keyword = inspect.Parameter.KEYWORD_ONLY
        vars(run)["__signature__"] = inspect.Signature(
            [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in hints.items()]
        )
        run.__annotations__ = hints
        app.command(getattr(job, "__name__", ""), help=inspect.getdoc(job))(run)
        return job

    return add


def _ordered(kind: type[Settings]) -> list[str]:
    """The fields of a class, its own before those of its bases."""
    declared = [name for base in kind.__mro__ for name in inspect.get_annotations(base) if name in kind.model_fields]
    return list(dict.fromkeys(declared))


def _hint(kind: type[Settings], name: str) -> Any:
    """The annotation that typer makes a field's flag from."""
    field, key = kind.model_fields[name], kind.keys()[name]
    found = next(_kinds(*field.metadata, field.annotation), None)
    text = _help(kind, name, field, found)
    if bool in (field.annotation, *get_args(field.annotation)):
        both = f"--{key.replace('_', '-')}/--no-{key.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(both, help=text, show_default=False)]
    shown = f"<{found.name if found else _plain(field.annotation)}>"
    if key == kind.argument:
        return Annotated[str | None, typer.Argument(help=text, metavar=key.upper(), show_default=False)]
    option = typer.Option(flag(kind, key), help=text, metavar=shown, show_default=False)
    repeated = not field.metadata and any(get_origin(part) is list for part in get_args(field.annotation))
    return Annotated[(list[str] if repeated else str) | None, option]


def _help(kind: type[Settings], name: str, field: FieldInfo, found: Kind | None) -> str:
    """The help of a flag. The default is in round brackets, because rich takes square ones for markup."""
    said = (base.model_fields.get(name) for base in kind.__mro__ if issubclass(base, Settings))
    text = next((one.description for one in said if one is not None and one.description), "")
    text = " ".join(text.replace("`", "").split())
    if field.is_required():
        return f"{text} (required)"
    if field.default is None:
        return text
    default = TEXTS.get(found.name if found else "", str)(field.default)
    if isinstance(field.default, bool):
        default = ("" if field.default else "no-") + name.replace("_", "-")
    return f"{text} (default: {default if default.isprintable() else repr(default)})"


def _kinds(*annotations: Any) -> Iterator[Kind]:
    """The kinds that stand in annotations, at any depth."""
    for annotation in annotations:
        if isinstance(annotation, Kind):
            yield annotation
        elif get_origin(annotation) in (Annotated, Union, types.UnionType, list):
            yield from _kinds(*get_args(annotation))


def _plain(annotation: Any) -> str:
    """The type of value that a field without a kind takes."""
    parts = {int: "int", float: "float"}
    return next((parts[part] for part in (annotation, *get_args(annotation)) if part in parts), "str")


def count_text(count: int) -> str:
    """The shortest text that `parse_count` reads as `count`."""
    letter, times = max(((k, n) for k, n in TIMES.items() if count % n == 0), key=itemgetter(1), default=("", 1))
    return f"{count // times}{letter if letter == 'k' else letter.upper()}" if count else "0"


def bytes_text(size: int) -> str:
    """The text that `parse_bytes` reads as `size`, in the largest unit that is exact."""
    units = ("B", "KiB", "MiB", "GiB")
    power = max(power for power in range(len(units)) if size % 1024**power == 0)
    return f"{size >> 10 * power}{units[power]}"


TEXTS: dict[str, Callable[[Any], str]] = {"count": count_text, "size": bytes_text}
"""How the help writes a default, by kind of field."""
