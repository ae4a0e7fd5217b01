"""The start-up checks: what is tried, what was found, and what to do about it."""
