"""Users' files: annotations, images, and writes that are whole or absent."""
