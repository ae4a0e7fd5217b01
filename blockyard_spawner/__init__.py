"""The root helper: spawns, stops and lists workers, and does nothing else."""
