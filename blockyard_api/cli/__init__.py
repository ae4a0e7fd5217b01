"""The command line `by`: a client of the HTTP API and of nothing else."""
