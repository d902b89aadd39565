"""An interactive page for a trained model: `python -m grain_jax.demo --checkpoint DIR` (docs/demo.md).

`analysis` has the numbers, `views` turns them into HTML, `page` is the Gradio page around both.
"""
