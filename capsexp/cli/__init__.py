"""The command `capsexp`."""


def main() -> int:
    """Run the command line of this process; return the exit code.

    The console script, `python -m capsexp` and other launchers call this function.
    """
    # Imported here: Ctrl-C must end the command quietly during the other imports, too.
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
