"""The command line: `grain-jax SUB ...`. The flags of every command, and what reads them; imports nothing heavy."""
