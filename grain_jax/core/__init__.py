"""What every other package may import: errors, the contract of a batch, images, files, text for terminals and HTML."""
