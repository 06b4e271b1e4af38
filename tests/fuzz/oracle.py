"""What may come of a call with hostile arguments, and what it must leave as it was."""

from __future__ import annotations

import dis
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Case", "Planted", "files_of", "model_of", "problem_of", "unchanged"]

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("tta", "corruptions", "models",
                                                          "experiments"))  # fmt: skip
HERE = f"{Path(__file__).parent}{os.sep}"
SECONDS, BYTES = 10, 2**30
LONGEST = 300  # characters of a message


class Planted(Exception):
    """What the generator's own objects raise; a caller sees it as it is."""


class _TooLongError(BaseException):
    """The processor time of a case is over."""


@dataclass
class Case:
    """One call.

    Args:
        words: What is called, for people.
        call: Calls it.
        watched: By name, what gives a comparable snapshot of something that a call which fails
            must leave as it was.
        always: Likewise, of something that no call may change.
        unwrapped: Whether RuntimeError is a right answer, as for an adapter that was unwrapped.
        status: Whether the call returns the exit status of a command and prints.
    """

    words: str
    call: Callable[[], Any]
    watched: dict[str, Callable[[], Any]] = field(default_factory=dict)
    always: dict[str, Callable[[], Any]] = field(default_factory=dict)
    unwrapped: bool = False
    status: bool = False


def problem_of(case: Case) -> str | None:
    """Run a case; None when all is right, else what is wrong, in words."""
    # A command is the end of its process.
    always = case.always | {k: v for k, v in GLOBALS.items() if not case.status or "gen" not in k}
    before = _snapshots(case.watched | always)
    start = time.process_time(), time.monotonic()
    failure: BaseException | None = None
    result: Any = None
    with warnings.catch_warnings(), _limits():
        warnings.simplefilter("ignore")
        try:
            result = case.call()
        except _TooLongError as error:
            trace = traceback.format_exception(error)
            return f"more than {SECONDS} s:\n{''.join(trace[-6:])}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = error
    wall = time.monotonic() - start[1]
    if wall > 6 * SECONDS:  # others may use this machine too
        return f"{wall:.0f} s, {time.process_time() - start[0]:.0f} s of them computing"
    found = _judge(case, failure, result)
    after = _snapshots(case.watched | always if failure is not None else always)
    changed = [name for name, value in after.items() if value != before[name]]
    if found is None and changed:
        found = f"changed: {', '.join(changed)}"
    if found is None or failure is None:
        return found
    return found + "\n" + "".join(traceback.format_exception(failure)[-12:])


def unchanged(value: Any, levels: int = 20) -> Any:
    """A comparable snapshot of tensors in any structure, down to some level."""
    if levels == 0:
        return type(value).__name__
    if isinstance(value, Tensor):
        if is_lazy(value):
            return "a parameter without a shape"
        if value.is_nested:
            return "nested"
        about = (str(value.dtype), tuple(value.shape), str(value.layout), str(value.device))
        large = value.numel() * value.element_size() > 10**7  # an expanded one
        if value.layout != torch.strided or value.is_meta or value.is_quantized or large:
            return about
        plain = value.detach().resolve_conj().resolve_neg()
        flat = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
        return (*about, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    if isinstance(value, (float, complex, np.generic)):
        return repr(value)  # in which NaN equals itself
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, None if value.dtype == object else value.tobytes()
    if isinstance(value, Mapping):
        return {str(key): unchanged(item, levels - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unchanged(item, levels - 1) for item in value]
    return value


def model_of(model: Any, wrapped: bool = False) -> Any:
    """A comparable snapshot of a model: values, gradients, objects, modes and hooks.

    Hooks in a ``wrapped`` model are the adapter's own affair.
    """
    if not isinstance(model, nn.Module):
        return None
    modules = list(model.named_modules())
    parameters = list(model.named_parameters())

    def hooks(module: nn.Module) -> int:
        return 0 if wrapped else len(module._forward_hooks) + len(module._forward_pre_hooks)

    return (
        [(n, type(m).__name__, m.training, hooks(m)) for n, m in modules],
        [(n, id(p), p.requires_grad, unchanged(p), unchanged(p.grad)) for n, p in parameters],
        [(n, unchanged(b)) for n, b in model.named_buffers()],
    )  # fmt: skip


def files_of(folder: Path) -> Any:
    """A comparable snapshot of a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = None if path.is_dir() else (path.stat().st_mode, path.read_bytes())
    return found


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return (state[0], state[1].tobytes(), *state[2:])


GLOBALS: dict[str, Callable[[], Any]] = {
    "generator of random": random.getstate,
    "generator of numpy": _numpy_state,
    "generator of torch": lambda: torch.get_rng_state().numpy().tobytes(),
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "default dtype": torch.get_default_dtype,
    "threads": torch.get_num_threads,
    "current folder": os.getcwd,
}


def _snapshots(watched: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    return {name: snapshot() for name, snapshot in watched.items()}


def _judge(case: Case, failure: BaseException | None, result: Any) -> str | None:
    if case.status:
        return _judge_status(failure, result)
    if failure is None:
        return None
    if isinstance(failure, Planted) or _of_callee(failure):
        return None
    kinds = (TypeError, ValueError, OSError, ImportError)
    kinds = (*kinds, RuntimeError) if case.unwrapped else kinds
    if not isinstance(failure, kinds):
        return f"raised {type(failure).__name__}"
    if isinstance(failure, UnicodeError):
        return f"raised {type(failure).__name__}"
    if (raw := _raw(failure.__traceback__)) is not None:
        return f"raw {type(failure).__name__} of {raw}"
    return None if _by_caller(failure.__traceback__) else _judge_words(str(failure))


def _of_callee(failure: BaseException) -> bool:
    """Whether the caller's own function or model does not take the arguments it is given."""
    found = re.search(
        r"\(\) (got (an unexpected|multiple|some positional)|missing|takes)", str(failure)
    )
    if type(failure) is NotImplementedError:  # an nn.ModuleList, which says it can be called
        return 'the required "forward"' in str(failure)
    return type(failure) is TypeError and found is not None


def _judge_words(text: str) -> str | None:
    if "\n" in text.strip():
        return f"a message of several lines: {text[:400]!r}"
    if len(text) > LONGEST:
        return f"a message of {len(text)} characters: {text[:600]!r}"
    return None if text.strip() else "an empty message"


def _judge_status(failure: BaseException | None, result: Any) -> str | None:
    if isinstance(failure, SystemExit):
        code, printed = failure.code, ""
    elif failure is not None:
        return f"raised {type(failure).__name__} on the command line"
    else:
        code, printed = result
    if code not in (0, 1, 2):
        return f"exit status {code!r}"
    lines = [line for line in printed.splitlines() if not line.startswith("warning:")]
    if code == 2 and not isinstance(failure, SystemExit):
        if len(lines) != 1:
            return f"a message of {len(lines)} lines: {printed[:400]!r}"
        if len(lines[0]) > LONGEST + len("error: "):
            return f"a message of {len(lines[0])} characters: {printed[:600]!r}"
    return None


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _by_caller(trace: TracebackType | None) -> bool:
    """Whether it was raised by what the generator made, or by its call itself."""
    last = _innermost(trace)
    return last is None or last.tb_frame.f_code.co_filename.startswith(HERE)


def _raw(trace: TracebackType | None) -> str | None:
    """Where an error comes from that no line of ours raises; None where one does."""
    last = _innermost(trace)
    if last is None or _by_caller(trace):
        return None
    code = last.tb_frame.f_code
    ours = code.co_filename.startswith(OURS)
    if ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]:
        return None
    return f"{code.co_filename}:{last.tb_lineno} ({code.co_name})"


@contextmanager
def _limits() -> Iterator[None]:
    """Within it, processor time and memory are limited, where the system can do that."""
    if not sys.platform.startswith("linux") or current_thread() is not main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLongError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + BYTES
    former = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, former)
