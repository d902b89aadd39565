"""The interactive page around no model, in a process of its own: python -m tests.hostile.page_server UPLOADS EXAMPLES."""

import os
import random
import sys

from grain_jax.demo import __main__ as command
from grain_jax.demo import analysis, class_lists


class Analyst(analysis.Analyst):
    """Says what it would analyse."""

    def __init__(self):
        self.queries, self.logit_scale, self.box_head, self.grid = 5, 1.0, False, 4
        self.writes = True

    def analyse(self, picture, classes, alpha):
        """Raises DemoError."""
        raise class_lists.DemoError(f"{picture.size} {list(classes)} {alpha}")


def main(uploads: str, examples: str) -> None:
    """Prints its address and serves it until it is killed."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    from grain_jax.demo import page

    pictures = [str(path) for path in command._draw(command.epath.Path(examples))]
    blocks = page.build(Analyst(), "a test", {"wren": ()}, pictures)
    for last in (False, False, False, True):
        port = random.randrange(20_000, 30_000)  # below those that the kernel gives to anyone
        try:
            print(
                page.launch(blocks, "127.0.0.1", port, uploads=uploads, examples=examples),
                flush=True,
            )
            break
        except class_lists.DemoError:
            if last:
                raise
    blocks.block_thread()


if __name__ == "__main__":
    main(*sys.argv[1:])
