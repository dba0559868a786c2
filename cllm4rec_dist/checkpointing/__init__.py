"""Files of a run: its folder, checkpoints that survive kills, and starting from another run."""
