"""Schema history, oldest first in `versions`."""
