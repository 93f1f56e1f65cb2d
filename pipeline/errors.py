"""The error a user can mend, which entry points print as one line and exit with status 2, and how others are known."""

import re

OUT_OF_MEMORY = re.compile(r"OutOfMemory|MemoryError|CUDA out of memory|allocate memory|bad_alloc|low on memory", re.I)
"""What the text of an error says when memory was lacking: Python's, torch's, the system's and Ray's word for it."""


class UserError(Exception):
    """One sentence that names the thing, the value found, and the way out."""
