"""An interactive page for a trained model: `grain-jax demo --checkpoint DIR` (docs/demo.md).

`analysis` has the numbers, `views` turns them into HTML, `page` is the Gradio page around both.
"""
