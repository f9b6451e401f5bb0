"""The commands around a run, one a file: `configure` adds a command's arguments to a parser, `run` does its work."""
