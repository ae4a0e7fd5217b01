"""What an app may be called: the catalogue insists on it, and `by` says so before it asks a server."""

import re

NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RULE = "A name has 1 to 63 lowercase letters, digits and hyphens, starts with a letter and ends in no hyphen."
