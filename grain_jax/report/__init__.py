"""Images and tables of what a run came to."""
