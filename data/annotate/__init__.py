"""Images in, grounded descriptions out: a chat model's captions and descriptions, a detector's boxes."""

LINES = "A.jsonl"  # the annotations of a job, in its output folder
PASSES = ("caption", "describe", "ground", "negatives")  # in their order
