"""Functions by name, with the options that a config gives them."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def call(what: str, functions: Mapping[str, Callable[..., T]], name: str, **options: Any) -> T:
    """Calls one of several functions.

    Args:
      what: they give, in the singular, for messages.
      functions: by name.
      name: of the one.
      **options: its arguments.

    Raises:
      ValueError: no such name; has the nearest.
      TypeError: an option that the function does not have; has the nearest.
    """
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=3, cutoff=0.4) or sorted(functions)
        raise ValueError(f"no {what} is named {name!r}; nearest: {', '.join(near)}")
    known = inspect.signature(functions[name]).parameters
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.4) or list(known)
            raise TypeError(
                f"{what} {name!r} has no option {option!r}; nearest: {', '.join(near) or 'none'}"
            )
    return functions[name](**options)
