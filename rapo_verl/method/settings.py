"""Settings: frozen dataclasses whose fields say what they allow, read from a mapping with every fault named at once."""

from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from math import isfinite
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: Any, allowed: str, ok: Callable[[Any], bool]) -> Any:
    """Return a field with its default and what it allows, in words and as a test; NaN and infinity never pass."""
    return field(default=default, metadata={"allowed": allowed, "ok": ok})


def one_of(default: str, names: tuple[str, ...]) -> Any:
    """Return a field that holds one of some names."""
    return setting(default, ", ".join(names), names.__contains__)


def read_settings(cls: type[T], node: Any, path: str, problems: list[str]) -> T:
    """Return ``cls`` with the values of a mapping, without those of a wrong type.

    Args:
        cls: its fields are made by `setting` or `one_of`, or are such dataclasses (``default_factory``).
        node: missing keys take their defaults.
        path: of the node, for messages.
        problems: gets a line for each unknown key and wrong type.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(node, Mapping):
        problems.append(f"{path} is {node!r}; allowed: a mapping with {', '.join(known)}")
        return cls()
    values: dict[str, Any] = {}
    for key, value in node.items():
        if key not in known:
            problems.append(f"unknown key {path}.{key}; allowed: {', '.join(known)}")
        elif is_dataclass(kind := known[key].type):
            values[key] = read_settings(kind, value, f"{path}.{key}", problems)  # type: ignore[arg-type]
        elif isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):  # type: ignore[arg-type]
            problems.append(f"{path}.{key} is {value!r}; allowed: {known[key].metadata['allowed']}")
        else:
            values[key] = value
    return cls(**values)


def out_of_bounds(settings: Any, path: str) -> list[str]:
    """Return a line for each value that its field does not allow, those of the dataclasses in it included."""
    found = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            found += out_of_bounds(value, f"{path}.{f.name}")
        elif (isinstance(value, float) and not isfinite(value)) or not f.metadata["ok"](value):
            found.append(f"{path}.{f.name} is {value!r}; allowed: {f.metadata['allowed']}")
    return found
