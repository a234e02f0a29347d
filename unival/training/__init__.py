"""The training engine: losses, schedule, step, checkpoints, logs."""
