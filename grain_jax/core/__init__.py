"""What every room may import: errors, the contract of a batch, images, files, text for terminals, HTML."""
