"""The command `capsexp`."""

import os

# Not `signal`, which imports for some milliseconds: Ctrl-C would print a traceback of that.
from _signal import SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]


def main() -> int:
    """Run the command line of this process; return the exit code.

    The console script, `python -m capsexp` and other launchers call this function.
    """
    if getsignal(SIGINT) is default_int_handler:  # until the imports below are done
        signal(SIGINT, lambda number, _: os._exit(128 + number))
    from capsexp.cli.signals import ending_quietly

    with ending_quietly():
        import sys

        from capsexp.child import protect_children
        from capsexp.cli import entry
        from capsexp.cli.streams import guard

        protect_children()
        writes = sys.argv[1:2] and sys.argv[1] in entry.WRITING
        with guard() as output:
            code = entry.main()
        return output.exit_code(code, unread=0 if writes else 141)
