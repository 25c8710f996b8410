"""What the user can mend: one message that names the key or file, what was found and the fix; exit code 2."""

import sys
from collections.abc import Callable

USER_ERROR_EXIT = 2


class UserError(ValueError):
    """A mistake in what the user gave (config, file, argument). Its text is all that the user is shown."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command line's `main` and exit with its status; a `UserError` is printed once and exits with 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR_EXIT
    sys.exit(status)
