"""How a program speaks to a terminal or a pipe, and how it ends where nobody listens any more.

Ctrl-C ends it with 130 and one line at any moment: while modules are imported, while it works, and
while the interpreter is torn down; a training past its first step saves its state instead, and ends
with 75. A pipe whose reader has gone is no error. An encoding that lacks a character (LC_ALL=C)
gets it as \\uXXXX, which JSON takes for the same. So are control characters of foreign text
written, on a terminal and off it, for all that is printed goes through `print_text`, `tell` or
`progress.say`; only a text that `generate` adds keeps them where no terminal is.
Not covered: Ctrl-C in the first hundredths of a second, in which Python itself starts; what other
libraries print, and tracebacks.
"""

from __future__ import annotations

import codecs
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
PROGRAMS = ("nexus-ds", "__main__.py", "train.py")
# All but the end of a line and a tabulator: what moves a cursor, sets colours, writes clipboards;
# and halves of characters, which JSON can name and no encoding can write.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Return foreign text with its control characters as \\uXXXX."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_line(text: object) -> str:
    """Return foreign text without its line ends, behind which it could pass for another line."""
    return " ".join(filter(None, str(text).splitlines()))


def print_text(text: str = "") -> None:
    """Print text for whoever asked for it, whatever names and words of others it holds.

    At once: several processes write to one log.
    """
    print(visible(text), flush=True)


def _as_json(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that an encoding lacks, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    units = lacking.encode("utf-16-be", "surrogatepass")
    pairs = range(0, len(units), 2)
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in pairs), error.end


def speak_any_encoding() -> None:
    """Let stdout and stderr write what their encoding lacks as \\uXXXX."""
    codecs.register_error("nexus_ds.json", _as_json)
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed from the start; something else in a test.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="nexus_ds.json")


def tell(text: str) -> None:
    """Say one last line to whoever still listens."""
    with suppress(OSError, ValueError, AttributeError):
        print(visible(text), file=sys.stderr, flush=True)


def flush() -> None:
    """Write out what was printed; OSError where it can't be.

    After a failure both streams lead nowhere, so that Python's own flush at the end has nothing to
    complain of.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Let stdout lead nowhere from now on."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()


def _is_program() -> bool:
    """Return whether this process is the command line, not something that calls it."""
    return Path(sys.argv[0]).name in PROGRAMS


@contextmanager
def answering_ctrl_c(name: str) -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, with 130 and one line, except in `unwinding`.

    For times when there is nothing to clear up and an exception could be lost, or shown, by
    whatever module is imported just then. In the program itself it stays so until the end.

    Args:
        name: of the command, for the line; '' says nothing.
    """
    # Python lets no other thread set handlers; what is not the default is somebody's choice.
    usual = signal.default_int_handler
    mine = threading.current_thread() is threading.main_thread()
    mine = mine and signal.getsignal(signal.SIGINT) is usual

    def leave(number: int, frame: FrameType | None) -> None:
        # Not print: the signal may have come amidst one.
        if name:
            with suppress(OSError):
                os.write(2, f"{name}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    if mine:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if mine and not _is_program():
            signal.signal(signal.SIGINT, usual)


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside, Ctrl-C is KeyboardInterrupt, so that `finally` clears up."""
    before = signal.getsignal(signal.SIGINT)
    if getattr(before, "__qualname__", "").startswith(answering_ctrl_c.__name__):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        # A handler of its own keeps what comes late: a training that stopped in order must not end
        # with another code.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
