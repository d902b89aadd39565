"""The tiny config as a file for `--config`, as a user's would be."""

from tests import tiny


def get_config():
    return tiny.dictionary()
