"""SIGTERM and Ctrl-C: at once where nothing is lost by it, after the step in progress while a model trains."""

import contextlib
import signal
import threading
from types import SimpleNamespace


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
