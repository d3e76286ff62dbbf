"""What ends a script from outside: SIGTERM and Ctrl-C, and a reader of its output that has left.

SIGTERM and Ctrl-C act at once where nothing is lost by it, and after the step in progress while a model trains.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from types import SimpleNamespace

# The exit status of a process that SIGPIPE ends, as a shell has it.
UNREAD = 128 + 13


class Stopped(KeyboardInterrupt):
    """A signal ended the work. `signum` is which one, the message what there is to say of it, empty for nothing."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def handled(handler, *signums):
    """Within the block, `handler` gets these signals but those that are ignored; gives a function that ends it before.

    Outside the main thread, which alone may ask for that, nothing changes.
    """
    earlier = {}

    def restore():
        while earlier:
            signal.signal(*earlier.popitem())

    try:
        if threading.current_thread() is threading.main_thread():
            for signum in signums:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as the shell has it for jobs in the background
                    earlier[signum] = signal.signal(signum, handler)
        yield restore
    finally:
        restore()


def terminable():
    """Within the block SIGTERM raises `Stopped`, so that what is half-written is removed."""

    def stop(signum, frame):
        raise Stopped(signum, "terminated; no file was left half-written")

    return handled(stop, signal.SIGTERM)


@contextlib.contextmanager
def put_off():
    """Within the block the first SIGTERM or Ctrl-C becomes the `signum` of what this gives; the second acts at once."""
    noted = SimpleNamespace(signum=0)

    def note(signum, frame):
        noted.signum = signum
        restore()

    with handled(note, signal.SIGINT, signal.SIGTERM) as restore:
        yield noted


@contextlib.contextmanager
def ended_by_its_reader():
    """Within the block a reader that has left, as `| head` does, ends the process without a word, with status 141.

    Python ignores SIGPIPE. A write then raises BrokenPipeError, at the latest when the interpreter ends and flushes.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise  # of another pipe
        for stream in unread:  # what they still hold is flushed at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(UNREAD)


def _is_unread(stream):
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
