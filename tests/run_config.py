"""The tiny config as a file for `--config`, as a user's would be."""

from tests import tiny


def get_config(arg=None):
    return tiny.dictionary()
