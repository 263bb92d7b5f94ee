"""The checker behind every annotation of the package while the tests run."""

from collections.abc import Callable
from typing import Any, Self

from beartype import beartype


def checked(function: Callable) -> Callable:
    """Returns `function` with its annotations checked at every call.

    Functions arrive here one at a time, without their class, so that beartype cannot
    know what `Self` is and refuses it.
    """
    function.__annotations__ = {
        name: Any if hint is Self else hint
        for name, hint in function.__annotations__.items()
    }
    return beartype(function)
