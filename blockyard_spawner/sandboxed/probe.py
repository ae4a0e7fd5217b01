"""What a worker can reach, seen from inside its sandbox: one JSON object a line on standard output."""

import json
import os
import sys

sys.stdout.write(json.dumps({"ran": True, "uid": os.getuid(), "gid": os.getgid()}) + "\n")
