"""`crumb` without a command: the wizard in the form this terminal can carry."""

import sys

from crumb.profiles.errors import RequestError
from crumb.wizard import terminal


def start(options) -> int:
    """The full-screen wizard, the line-by-line one (--plain), or the help where nobody can answer."""
    if options.plain:
        from crumb.wizard.plain import interview

        return interview(options.ascii)
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # Textual draws on stderr
        from crumb.wizard.cli import build_parser

        build_parser().print_help(sys.stderr)
        print("\ncrumb: the wizard needs a terminal, and this is none. Use a command above.", file=sys.stderr)
        return 2
    reason = terminal.refusal()
    if reason:
        raise RequestError(reason)
    terminal.set_up_textual()
    from crumb.wizard.app import run_wizard

    return run_wizard(options.ascii)
