"""The command `capsexp`."""

import os
import signal


def main() -> int:
    """Run the command line of this process; return the exit code.

    The console script, `python -m capsexp` and other launchers call this function.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C would print a traceback of the imports below.
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
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
