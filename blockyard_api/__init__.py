"""The unprivileged daemon, its relay and the command line `by`."""
