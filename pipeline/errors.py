"""The error a user can mend: entry points print it as one line and exit with status 2, no traceback."""


class UserError(Exception):
    """One sentence that names the thing, the value found, and the way out."""
