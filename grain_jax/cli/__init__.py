"""The command line: `grain-jax SUB ...`: the one parser, and the list of commands."""
