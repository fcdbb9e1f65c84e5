"""What sections of settings are made of: types of numbers, a line about each setting, the rules of all."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """YAML 1.1 reads `6e-4` as text, and so does a command line."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _words(value: Any) -> Any:
    """One path is a list of one; the weights in `[0.3, a.txt, 0.7, b.txt]` are words like the paths."""
    if isinstance(value, list):
        return [str(item) if isinstance(item, int | float) else item for item in value]
    return [value] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1)]
# What loops over layers must end: no model has a hundredth of these.
Layers = Annotated[int, Field(ge=1, le=10_000)]
Steps = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]
# An empty one is what an unset variable of the shell leaves: as a folder it would be the working directory.
Text = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Text], Field(min_length=1), BeforeValidator(_words)]


def setting(text: str, default: Any = ..., *, older_values: Mapping[str, str] | None = None) -> Any:
    """A setting and the line about it; without a default it is required.

    ``older_values``: names that values had in earlier versions, and the names that they have now.
    """
    return Field(default, description=text, json_schema_extra=dict(older_values or {}) or None)


class Section(BaseModel):
    """Common rules of all sections: immutable, no unknown fields, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
