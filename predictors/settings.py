"""Settings of a job: a frozen class whose fields are also the keys of a YAML file and the flags of the command line.

The docstring under a field is its help. The class checks every value, wherever it comes from, and an error names the
field.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
import sys
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from .errors import UserError


class SettingsError(UserError):
    """A setting that is unknown, missing or of a wrong type; the message names it."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)

    argument: ClassVar[str | None] = None
    """The field that is a positional argument on the command line."""

    @classmethod
    def keys(cls) -> dict[str, str]:
        """By field, its name in a file (on the command line, with dashes): the field's own or its alias."""
        return {name: field.alias or name for name, field in cls.model_fields.items()}

    def values_of(self, kind: type[Settings]) -> dict[str, Any]:
        """The values of the fields that `kind` has too, by field."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in kind.model_fields}


S = TypeVar("S", bound=Settings)

_WRITTEN = {"written": True}
"""Validation's context for values from a file or the command line, where a size needs its unit."""
_SHORT = reprlib.Repr()  # unlike `repr`, it stops early in deep or long values
_SHORT.maxstring = _SHORT.maxother = 200


def load_config(kind: type[S], file: Path | None, flags: dict[str, Any]) -> S:
    """Settings of `kind` from `flags`, which beat the YAML `file`, which beats the defaults.

    A flag that is None was not given. Raises `SettingsError` for a file that can't be read, an unknown key (naming
    the nearest known one) and a wrong value.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = ({} if file is None else _read_yaml(Path(file).expanduser())) | given
    _check_names(values, kind.keys().values(), f" (in {file})" if file else "")
    for name, value in values.items():
        if not _is_text(value):
            encoding = sys.getfilesystemencoding()
            raise SettingsError(
                f"{flag(kind, name)} can't be {_plain(value)}; it can't be read as {encoding}; give UTF-8 in a UTF-8 locale"
            )
    try:
        return kind.model_validate(values, context=_WRITTEN)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name in given:
            message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
            sentence = f"{flag(kind, name)} can't be {_plain(given[name])}; {message[:1].lower()}{message[1:]}"
        else:
            sentence = describe(error) + ("; give it as a flag or in the file" if first["type"] == "missing" else "")
        raise SettingsError(sentence) from error


def make(kind: type[S], **values: Any) -> S:
    """Settings of `kind` from Python values. Raises `SettingsError` naming the field that is unknown or wrong."""
    _check_names(values, {*kind.model_fields, *kind.keys().values()}, "")
    try:
        return kind(**values)
    except ValidationError as error:
        raise SettingsError(describe(error)) from error


def combined(kind: type[S], config: Settings | None, settings: dict[str, Any]) -> S:
    """Settings of `kind` from an object and from Python values, which win. Raises `SettingsError` as `make` does."""
    if not isinstance(config, Settings | None):
        raise SettingsError(f"config is {shown(config)}; give the settings by name, or as one {kind.__name__}")
    return make(kind, **((config.model_dump() if config is not None else {}) | settings))


def flag(kind: type[Settings], key: str) -> str:
    """The command line's name for the setting that a file calls `key`."""
    return key.upper() if key == kind.argument else "--" + key.replace("_", "-")


def _check_names(values: Iterable[Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise SettingsError(f"there is no setting {key}{where}; {hint}")


def describe(error: ValidationError) -> str:
    """The first of a validation's errors as one sentence that names the field."""
    first = error.errors()[0]
    # For a union, pydantic also names the type that it tried, like `list[int]`.
    field = ".".join(shown(str(part))[1:-1] for part in first["loc"] if "[" not in str(part))
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    # A whole entry is too long to show.
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{field}: {message}" if field else message
    return f"{field or 'value'}: {message[:1].lower()}{message[1:]}, but it is {shown(first['input'])}"


def _is_text(value: Any) -> bool:
    """Whether it is characters only. Bytes that no character stands for come from a terminal as halves of surrogate pairs."""
    parts = value if isinstance(value, list) else [value]
    try:
        for part in parts:
            if isinstance(part, str):
                part.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> str:
    """A flag's value as it was given."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown(text)[1:-1] if len(text) > 200 or not text.isprintable() else text


def shown(value: Any) -> str:
    """A value for a sentence: on one line, and cut if it is long."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number that is too long to show"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} can't be read ({error}); name a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A date or a number may be impossible, and lists may be too deep.
        raise SettingsError(f"{file} is not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(values, dict | None):
        raise SettingsError(f"{file} holds no settings; write one `name: value` a line")
    return values or {}


# -- kinds of fields ---------------------------------------------------------------------------------------------

LARGEST = 10**18
"""Counts are smaller, in text without their unit."""
TIMES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = TypeAdapter(ByteSize)


def choice(plural: str, *names: str) -> BeforeValidator:
    """Requires a field to be one of `names`; the error lists them."""

    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"{plural} are {', '.join(names)}")
        return value

    return BeforeValidator(check)


def parse_count(value: Any) -> Any:
    """The whole number that text like `400k`, `1e5` or `2M` gives; other values are returned unchanged."""
    advice = ValueError("give a whole number like 5000, 400k, 1e5 or 2M")
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= LARGEST):
        raise advice
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    times = TIMES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if times > 1 else text)
        if number.is_finite() and abs(number) < LARGEST and number * times == int(number * times):
            return int(number * times)
    except ArithmeticError:  # decimal's errors are of this class
        pass
    raise advice


def parse_bytes(text: str) -> int:
    """Bytes from text like `8GiB` or `500MB`. Raises `ValueError` if it is no size or has no unit."""
    if re.fullmatch(r"[\d\s._]*", text.strip()):
        raise ValueError("a size needs a unit: give bytes like 8GiB or 500MB")
    try:
        return int(_BYTES.validate_python(text.strip()))
    except ValidationError as error:
        raise ValueError("give bytes like 8GiB or 500MB") from error


def is_written(info: ValidationInfo) -> bool:
    """Whether the value comes from a file or the command line."""
    return info.context is _WRITTEN


def _size(value: Any, info: ValidationInfo) -> Any:
    return parse_bytes(str(value)) if isinstance(value, str) or is_written(info) else value


def _rate(value: Any, info: ValidationInfo) -> Any:
    try:
        return _size(value.removesuffix("/s") if isinstance(value, str) else value, info)
    except ValueError as error:
        raise ValueError("give bytes per second like 25GB/s") from error


def parse_layers(value: Any) -> Any:
    """Layer numbers from text like `0,1`, `3` or `0-3,7`, a number or a list; `all` and `auto` stay as they are."""
    if value in ("all", "auto"):
        return value
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    layers: list[int] = []
    for part in parts:
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", str(part))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError("give all, auto, or layer numbers like 0,1 or 0-3")
        layers += range(first, last + 1)
    return layers


def _horizon(value: Any) -> Any:
    if str(value) not in ("1", "2"):
        raise ValueError("guess 1 or 2 layers ahead")
    return int(value)


def _memory(value: Any) -> Any:
    if str(value) not in ("0", "1", "2"):
        raise ValueError("remember 0, 1 or 2 tokens")
    return int(value)


def _in_a_folder(file: Path) -> Path:
    if not file.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} to write {file.name} to; make it first")
    if file.is_dir():
        raise ValueError("it is a folder; name a file")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ValueError("it can't be written; name another file")
    return file


def _picture(file: Path) -> Path:
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError("give a file that ends in .png, .pdf or .svg")
    return file


def _expanded(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    path = os.path.expanduser(value)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("it is longer than the system allows; give a shorter one") from error
    except ValueError as error:  # of a null character
        raise ValueError("it holds a character that no path can have; leave it out") from error
    return path


class Kind(NamedTuple):
    """The kind of value that a field takes, as the command line's help names it."""

    name: str


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0), Kind("count")]
"""A whole number from 1 up; also text like `400k`, `1e5` or `2M`."""
Whole = Annotated[int, BeforeValidator(parse_count), Field(ge=0), Kind("count")]
"""The same, or 0."""
Seed = Annotated[Whole, Field(lt=2**32)]
"""Of random numbers."""
Bytes = Annotated[int, BeforeValidator(_size), Field(gt=0), Kind("size")]
"""Bytes; text needs a unit, and so does a number in a file."""
Rate = Annotated[int, BeforeValidator(_rate), Field(gt=0), Kind("rate")]
"""Bytes per second, like `25GB/s`."""
Layers = Annotated[Literal["all", "auto"] | list[int], BeforeValidator(parse_layers), Kind("layers")]
"""Layers of a model: `all`, `auto`, or numbers like `0,1` or `0-3,7`."""
Horizon = Annotated[int, BeforeValidator(_horizon)]
"""MoE layers from a source to its target: 1 or 2."""
Memory = Annotated[int, BeforeValidator(_memory)]
"""Tokens that a predictor remembers: 0, 1 or 2."""
Name = Annotated[str, BeforeValidator(_expanded), Kind("name")]
"""A path or a name of the Hub; `~` is the user's home."""
Device = Annotated[str, BeforeValidator(lambda device: "auto" if device is None else str(device))]
"""A device; from Python also torch's own type."""
Dtype = Annotated[str, BeforeValidator(lambda dtype: str(dtype).removeprefix("torch."))]
"""The dtype of weights; from Python also torch's own type."""
LocalPath = Annotated[Path, BeforeValidator(_expanded), Kind("path")]
"""A path on this machine; `~` is the user's home."""
Output = Annotated[LocalPath, AfterValidator(_in_a_folder)]
"""A file to write, in a folder that exists."""
Picture = Annotated[Output, AfterValidator(_picture)]
"""A figure to write."""


class Figures(Settings):
    """The setting of all jobs that measure."""

    json_file: Output | None = Field(None, alias="json")
    """Writes all figures to this file."""
