"""Settings of training, checked by pydantic: strict types, and messages that say what was given and what is expected.

Settings are frozen pydantic dataclasses; `build` makes them from the nested tables of a TOML file or from options.
"""

import dataclasses
import re
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from mea.names import did_you_mean

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)  # also resolves a default "fast"
Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[StrictFloat, Field(gt=0)]
NotNegative = Annotated[StrictFloat, Field(ge=0)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Share = Annotated[StrictFloat, Field(gt=0, lt=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=1 << 32)]  # what numpy takes
Table = dict[str, JsonValue]  # settings are stored as JSON, which has no dates
# A lone string in TOML is a list of one.
Names = Annotated[tuple[StrictStr, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Settings = TypeVar("Settings")


def build(cls: type[Settings], values: Any, table: str = "") -> Settings:
    """Settings from a dict; nested settings from nested dicts. `table` is where the values stand in a file.

    Raises
    ------
    ValueError
        An unknown name (the message suggests a similar one), or a value of the wrong type or out of range.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        # A list with a wrong item counts as too short as well.
        details = [detail for detail in error.errors() if detail["type"] != "too_short"] or error.errors()
        raise ValueError("; ".join(_message(cls, detail, table) for detail in details)) from None


def _message(cls: type, error: ErrorDetails, within: str) -> str:
    parts, value = [within, *error["loc"]], error["input"]
    table, name = _path(parts[:-1]), _path(parts)
    match error["type"]:
        case "value_error":
            return str(error.get("ctx", {})["error"])
        case "unexpected_keyword_argument":
            for part in error["loc"][:-1]:
                if isinstance(part, str):  # an item of a tuple has its type
                    cls = next(field.type for field in dataclasses.fields(cls) if field.name == part)  # pyright: ignore
                while get_args(cls):  # tuple[cls, ...], Annotated[cls, ...]
                    cls = get_args(cls)[0]
            known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
            start = f"[{table}] has" if table else "there is"
            return f"{start} no {parts[-1]!r}; known are {', '.join(known)}{did_you_mean(parts[-1], known)}"
        case "missing":
            return f"[{table or 'settings'}] lacks {parts[-1]}"
        case "dataclass_type":
            return f"[{name}] must be a table, not {value!r}"
    if not error["msg"].startswith("Input should be "):
        return f"{name}: {error['msg']}, not {value!r}"
    expected = error["msg"].removeprefix("Input should be ").replace("tuple", "list").replace("dictionary", "table")
    guess = did_you_mean(value, re.findall("'([^']+)'", expected)) if error["type"] == "literal_error" else ""
    return f"{name} must be {expected}, not {value!r}{guess}"


def _path(parts: list[Any]) -> str:
    """``stage 1.arms``: items are counted from 1."""
    return "".join(f" {part + 1}" if isinstance(part, int) else f".{part}" for part in parts if part != "").lstrip(".")
