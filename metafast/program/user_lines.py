"""Finds the line of the user's code that is being run."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch

_TORCH = os.path.dirname(torch.__file__)
_OWN = os.path.dirname(os.path.dirname(__file__))


def user_line() -> str:
    """Returns the innermost line outside of torch and of this package, as ``file:number (text)``.

    It is empty where there is none between this call and the run of the model.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OWN) and frame.f_code.co_name == "call":
            return ""
        if not name.startswith((_TORCH, _OWN, "<frozen", "<string>")) and "contextlib" not in name:
            text = linecache.getline(name, frame.f_lineno).strip()
            return f"{name}:{frame.f_lineno} ({text})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def is_within(part: str) -> bool:
    """Says whether a part of torch, such as ``distributions``, is being run."""
    frame, folder = sys._getframe(1), os.path.join(_TORCH, part)
    while frame is not None and not frame.f_code.co_filename.startswith(folder):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def error_line(error: BaseException) -> str:
    """Returns the innermost line outside of torch and of this package that ``error`` went through, likewise."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _OWN, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


Found = TypeVar("Found")


def line_behind(
    run: Callable[[], Found], state: Callable[[], Any], error: Callable[[Exception, str], Exception]
) -> Found:
    """Calls ``run`` while it looks, line by line, for the one that changes what ``state`` returns.

    Raises:
        Exception: ``run`` has raised; it is what ``error`` makes of that and of the line.
    """
    found, known, last = "", state(), ""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal found, last
        name = frame.f_code.co_filename
        if name.startswith((_TORCH, _OWN, "<")):
            return None
        if not found and state() != known:
            found = last
        last = f"{name}:{frame.f_lineno} ({linecache.getline(name, frame.f_lineno).strip()})"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run()
    except Exception as raised:
        raise error(raised, found or last) from None
    finally:
        sys.settrace(before)
