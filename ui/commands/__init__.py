"""The commands of `millstream`, one file each: `add(subparsers)` declares it, `run(arguments)` gives the exit code."""
