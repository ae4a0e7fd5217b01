"""Run one oracle under coverage guidance: `guided.py NAME SECONDS SEED DIRECTORY`.

A process of its own, since libFuzzer ends the one that it runs in. What it found stays in DIRECTORY.
"""

import os
import sys
from pathlib import Path

os.environ["MSGPACK_PUREPYTHON"] = "1"  # as the spawner reads; and only Python can be followed

import atheris

with atheris.instrument_imports(include=["blockyard_spawner.protocol", "blockyard_api.relay", "msgpack.fallback"]):
    import oracles

name, seconds, seed, directory = sys.argv[1:]
found = Path(directory, "corpus")
found.mkdir()
options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={directory}/", "-max_len=4096"]
options += ["-rss_limit_mb=1024", "-timeout=30", "-print_final_stats=1", "-verbosity=1"]
atheris.Setup([sys.argv[0], *options, str(found), str(Path(__file__).parent / "corpus" / name)], oracles.GUIDED[name])
atheris.Fuzz()
