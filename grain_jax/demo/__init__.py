"""An interactive page for a trained model: `grain-jax demo --checkpoint DIR` (docs/demo.md)."""
