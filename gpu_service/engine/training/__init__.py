"""Training on a loaded model: batches, losses, the loop, evaluation, samples and checkpoints."""
