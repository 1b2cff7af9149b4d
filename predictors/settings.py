"""Settings of a job: pydantic models filled from a YAML file and flags, with errors that name the field."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError


class SettingsError(UserError):
    """A setting that is unknown, missing or of a wrong type; the message names it."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, and values don't change once they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)

_SHORT = reprlib.Repr()  # which does not follow a value as deep or as far as `repr` would
_SHORT.maxstring = _SHORT.maxother = 200


def load_config(kind: type[S], file: Path | None, flags: dict[str, Any]) -> S:
    """Settings of `kind` from `flags`, which beat the YAML `file`, which beats the defaults.

    A flag that is None was not given. Raises `SettingsError` for a file that can't be read, an unknown key (naming
    the nearest right one) and a value of a wrong type.
    """
    values = {} if file is None else _read_yaml(Path(file))
    values |= {name: value for name, value in flags.items() if value is not None}
    for key in values:
        if key not in kind.model_fields:
            nearest = difflib.get_close_matches(str(key), kind.model_fields, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(kind.model_fields)}"
            raise SettingsError(f"there is no setting {key}{f' (in {file})' if file else ''}; {hint}")
    try:
        return kind(**values)
    except ValidationError as error:
        advice = "; give it as a flag or in the file" if error.errors()[0]["type"] == "missing" else ""
        raise SettingsError(describe(error) + advice) from error


def describe(error: ValidationError) -> str:
    """The first of a validation's errors as one sentence that names the field."""
    first = error.errors()[0]
    # Of a union, pydantic also names the kind that it tried, like `list[int]`.
    field = ".".join(shown(str(part))[1:-1] for part in first["loc"] if "[" not in str(part))
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    # A whole entry is too long to show.
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{field}: {message}" if field else message
    return f"{field or 'value'}: {message[:1].lower()}{message[1:]}, but it is {shown(first['input'])}"


def shown(value: Any) -> str:
    """A value as a sentence shows it: on one line, and cut where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} can't be read ({error}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(values, dict | None):
        raise SettingsError(f"{file} holds no settings; write one `name: value` a line")
    return values or {}
