"""The commands around a run, one per file: `configure` adds the arguments to a parser, `run` does the work."""
