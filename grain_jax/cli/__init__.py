"""The command line: `grain-jax SUB ...`: the one parser, the list of commands, and what reads a config file."""
