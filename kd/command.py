"""Running a script: signals, and how trouble is said.

Status 0: done. 2: something the user can put right, one sentence on standard error. 128 + number: a
signal asked to stop.
"""
import contextlib
import errno
import io
import os
import signal
import sys
import time
from pathlib import Path

from kd.files import UserError, first_line, is_first, let_go

# Batch systems send SIGUSR1 before the time limit.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1")
            if hasattr(signal, name)]
REPEATED = 2.0          # seconds within which a second signal is the first again, from torchrun
OTHERS_WAIT = 5.0       # seconds before another process than the first one says what is wrong


class Interrupted(KeyboardInterrupt):
    """A signal has asked to stop: its number."""


class _Signals:
    """pending: the number of a signal that waits, or 0; since: when it came; orderly: whether work
    is under way that wants to end a step first."""
    pending, since, orderly = 0, 0.0, False


def interrupted():
    """The number of the signal that asks to stop; 0 where none does."""
    return _Signals.pending


@contextlib.contextmanager
def orderly():
    """Within it a signal does not stop the work at once: `interrupted` tells of it, and the work
    raises Interrupted where it can be resumed."""
    _Signals.orderly = True
    try:
        yield
    finally:
        _Signals.orderly = False
    if _Signals.pending:        # it ended before it looked
        raise Interrupted(_Signals.pending)


def _on_signal(number, frame):
    now, first = time.monotonic(), not _Signals.pending
    if first:
        _Signals.pending, _Signals.since = number, now
    if first and not _Signals.orderly or now - _Signals.since > REPEATED:
        raise Interrupted(number)       # who asks again does not want to wait


def command(main):
    """Runs a script's main(argv) and exits."""
    for number in STOPPING:
        signal.signal(number, _on_signal)
    if isinstance(sys.stdout, io.TextIOWrapper):        # names that no console has
        sys.stdout.reconfigure(errors="backslashreplace")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if several:
            from kd import processes
            processes.start_processes()
        main(sys.argv[1:])
        if several:
            processes.end_processes()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:     # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.errno == errno.ENOENT or error.filename is None and not full:
            raise       # mostly code of the user's
        _fail(f"{error.filename or 'the disk'}: {first_line(error)}. " + (
            f"The files written so far are complete. {_how_to_resume()}" if full else
            "Choose another folder, with --data-dir or --run-dir."))
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            _fail("a process that decodes images was killed, mostly for lack of memory. There are "
                  "fewer where fewer cores may be used (taskset -c 0,1).")
        if not several or "by peer" not in str(error):
            raise
        _fail("another process has ended.", late=True)
    except KeyboardInterrupt as error:
        if is_first():
            print(f"\nInterrupted. {_how_to_resume()}", file=sys.stderr, flush=True)
        sys.exit(128 + (error.args[0] if isinstance(error, Interrupted) else signal.SIGINT))
    finally:
        let_go()


def _fail(message, late=False):
    """Ends with status 2. What every process runs into, the first one says; late: what another one
    has said already, if it could."""
    program = Path(sys.argv[0]).name
    if late or not is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT)         # torchrun ends this process meanwhile
        program = f"{program}, process {os.environ['RANK']}"
    for line in message.splitlines():
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def _how_to_resume():
    given = [word.partition("=")[0] for word in sys.argv if word.startswith("--restart")]
    return f"Run the same command again{' without ' + given[0] if given else ''} to resume."
