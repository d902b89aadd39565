"""Import of big_vision checkpoints (.npz): its ViT and text tower, alone or in a two_towers model."""
