"""Speed of CLIP's tokenizer with each of its libraries, beside that of open_clip.

    python -m benchmarks.tokenizer [--texts 20000] [--turns 5] [--json OUT.json]

The texts are captions and descriptions of 3 to 20 words.
"""

import functools
import random

from open_clip.tokenizer import SimpleTokenizer

from benchmarks import harness, made
from grain_jax.input_pipeline import clip_tokenizer, text_cleaning


def main() -> None:
    """Prints the table."""
    args = harness.arguments(__doc__, texts=20_000, turns=5)
    machine, rng = harness.machine("open_clip_torch"), random.Random(0)
    tokenizers = {"open_clip": SimpleTokenizer(context_length=77)}
    for backend in ("huggingface", "instant"):
        try:
            tokenizers[backend] = clip_tokenizer.ClipTokenizer(backend)
        except text_cleaning.TokenizerError as error:
            print(error)
    texts = [" ".join(rng.choices(made.WORDS, k=rng.randint(3, 20))) for _ in range(args.texts)]
    batches = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
    run = lambda tokenize: [tokenize(batch) for batch in batches]
    ways = {name: functools.partial(run, tokenize) for name, tokenize in tokenizers.items()}
    table = harness.Table(dict(tokenizer="12", microseconds_a_text=">24.1f"))
    for name, timing in harness.in_turns(ways, turns=args.turns, warm_up=0).items():
        each = [1e6 * seconds / len(texts) for seconds in timing.seconds]
        table.add(tokenizer=name, microseconds_a_text=each)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
