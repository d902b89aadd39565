"""Images in, grounded descriptions out: a chat model's captions and descriptions, a detector's boxes."""
