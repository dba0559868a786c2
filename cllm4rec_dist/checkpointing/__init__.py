"""What a run keeps on disk: its folder, checkpoints that survive kills, and starting from another run."""
