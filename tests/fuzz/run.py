"""What `scripts/fuzz` runs: some targets, one after the other."""

import argparse
import secrets
import sys

import targets


def main() -> int:
    """Run what was asked for; return the exit status."""
    members = {name: group for group, some in targets.TARGETS.items() for name in some}
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("--seconds", type=float, default=600, help="for each group (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="as an earlier run told it")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join([*targets.TARGETS, *members]))
    asked = parser.parse_args()
    chosen: list[tuple[str, str, float]] = []
    for wanted in asked.targets or targets.TARGETS:
        if wanted in targets.TARGETS:
            some = targets.TARGETS[wanted]
            chosen += [(wanted, name, asked.seconds / len(some)) for name in some]
        elif wanted in members:
            chosen.append((members[wanted], wanted, asked.seconds))
        else:
            parser.error(f"there is no target {wanted}; there are {', '.join([*targets.TARGETS, *members])}")
    failed = 0
    for group, name, seconds in chosen:
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        print(f"{name}: {seconds:.0f} s, seed {seed}", flush=True)
        try:
            print(f"{name}: {targets.run(group, name, seconds, seed)}", flush=True)
        except targets.Found as found:
            failed += 1
            print(f"{name}: found\n{found}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
