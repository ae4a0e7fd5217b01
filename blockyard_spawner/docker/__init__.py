"""The other helper: the same protocol, with a container engine behind it. The root helper loads nothing of this."""
