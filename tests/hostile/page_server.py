"""The interactive page around no model, in a process of its own: python -m tests.hostile.page_server UPLOADS EXAMPLES PORT."""

import os
import sys

from grain_jax.demo import __main__ as command
from grain_jax.demo import analysis


class Analyst(analysis.Analyst):
    """Says what it would analyse."""

    def __init__(self):
        self.queries, self.logit_scale = 5, 1.0

    def analyse(self, picture, classes, alpha):
        """Raises DemoError."""
        raise analysis.DemoError(f"{picture.size} {list(classes)} {alpha}")


def main(uploads: str, examples: str, port: str) -> None:
    """Serves it until it is killed."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    from grain_jax.demo import page

    pictures = [str(path) for path in command._draw(command.epath.Path(examples))]
    blocks = page.build(Analyst(), "a test", {"wren": ()}, pictures)
    print(
        page.launch(blocks, "127.0.0.1", int(port), uploads=uploads, examples=examples), flush=True
    )
    blocks.block_thread()


if __name__ == "__main__":
    main(*sys.argv[1:])
