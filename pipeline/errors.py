"""What the user can mend: one message that names the key or file, what was found and the fix; exit code 2."""

import sys
from collections.abc import Callable

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130


class UserError(ValueError):
    """A mistake in what the user gave (config, file, argument). Its text is all that the user is shown."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command line's `main` and exit with its status.

    A `UserError` is printed once and exits with 2; Ctrl-C, where `main` does not see to it itself, with 130.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED_EXIT
    sys.exit(status)
