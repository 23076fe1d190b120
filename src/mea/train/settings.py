"""Settings of training, checked by pydantic: strict types, and messages that say what was given and what is expected.

Settings are frozen pydantic dataclasses; `build` makes them from the nested tables of a TOML file or from options.
"""

import dataclasses
import re
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mea.names import did_you_mean

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[StrictFloat, Field(gt=0)]
NotNegative = Annotated[StrictFloat, Field(ge=0)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
# A lone string in TOML is a list of one.
Names = Annotated[tuple[StrictStr, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Settings = TypeVar("Settings")


def build(cls: type[Settings], values: Any) -> Settings:
    """Settings from a dict; nested settings from nested dicts.

    Raises
    ------
    ValueError
        An unknown name (the message suggests a similar one), or a value of the wrong type or out of range.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError("; ".join(_message(cls, detail) for detail in error.errors())) from None


def _message(cls: type, error: ErrorDetails) -> str:
    path, value = [str(part) for part in error["loc"]], error["input"]
    table, name = ".".join(path[:-1]), ".".join(path)
    match error["type"]:
        case "value_error":
            return str(error.get("ctx", {})["error"])
        case "unexpected_keyword_argument":
            for part in path[:-1]:
                cls = next(field.type for field in dataclasses.fields(cls) if field.name == part)  # pyright: ignore
            known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
            start = f"[{table}] has" if table else "there is"
            return f"{start} no {path[-1]!r}; known are {', '.join(known)}{did_you_mean(path[-1], known)}"
        case "missing":
            return f"[{table or 'settings'}] lacks {path[-1]}"
        case "dataclass_type":
            return f"[{name}] must be a table, not {value!r}"
    expected = error["msg"].removeprefix("Input should be ")
    guess = did_you_mean(value, re.findall("'([^']+)'", expected)) if error["type"] == "literal_error" else ""
    return f"{name} must be {expected}, not {value!r}{guess}"
