"""Speed of CLIP's tokenizer with each of its libraries, and whether the ids are those of open_clip.

    python -m benchmarks.tokenizer [--texts 20000] [--turns 5] [--json OUT.json]

The texts of the speed are captions and descriptions of 3 to 20 words; the turns of the tokenizers alternate. The ids
are compared on texts of random characters: those that Python's Unicode assigns, without U+0345.
"""

import random
import time
import unicodedata

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from benchmarks import harness
from grain_jax.input_pipeline import clip_tokenizer, text_cleaning

CONTEXT = 77
WORDS = """a the small brown bird with long red beak and white belly sits on branch of old oak tree near wooden
fence in green field under blue sky at sunset two people walking dog past shop window yellow taxi street photo close up
portrait woman smiling holding cup coffee vintage poster design free vector illustration 2019 2x4 new york city's""".split()
PIECES = "don't we'LL 's &amp; &lt; 3.14 100% \t \u0301 \ufb01n \u0130stanbul \u2167 \U0001f99c"
RANGES = ((0x20, 0x7F), (0xA0, 0x2000), (0x2000, 0x10000), (0x10000, 0x110000))  # of all scripts


def strange(rng: random.Random, number: int) -> list[str]:
    """Texts of characters of all scripts, with words that tokenizers tend to differ on."""
    known = [
        [c for c in map(chr, range(*ends)) if unicodedata.category(c) not in ("Cs", "Cn")]
        for ends in RANGES
    ]
    known[1].remove("\u0345")
    pieces = PIECES.split(" ")
    piece = lambda: rng.choice(pieces if rng.random() < 0.2 else rng.choice(known))
    return ["".join(piece() for _ in range(rng.randint(0, 40))) for _ in range(number)]


def main() -> None:
    """Prints both tables."""
    args = harness.arguments(__doc__, texts=(20_000, dict(help="texts of each table")), turns=5)
    machine = harness.machine("open_clip_torch")
    rng, reference = random.Random(0), SimpleTokenizer(context_length=CONTEXT)
    tokenizers = {"open_clip": lambda texts: reference(texts).numpy()}
    for backend in ("huggingface", "instant"):
        try:
            tokenizers[backend] = clip_tokenizer.ClipTokenizer(backend)
        except text_cleaning.TokenizerError as error:
            print(error)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(args.texts)]
    seconds = {name: [] for name in tokenizers}
    for _ in range(args.turns):
        for name, tokenize in tokenizers.items():
            began = time.process_time()
            for i in range(0, len(texts), 1024):
                tokenize(texts[i : i + 1024])
            seconds[name].append(time.process_time() - began)
    print("CPU microseconds a text; of the strange texts, how many have other ids than open_clip's")
    table = harness.Table(dict(tokenizer="12", microseconds=">24.1f", different=">9"))
    texts = strange(rng, args.texts)
    ids = {name: np.asarray(tokenize(texts)) for name, tokenize in tokenizers.items()}
    for name, turns in seconds.items():
        different = int((ids[name] != ids["open_clip"]).any(axis=1).sum())
        each = [1e6 * turn / len(texts) for turn in turns]
        table.add(tokenizer=name, microseconds=each, different=different)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
