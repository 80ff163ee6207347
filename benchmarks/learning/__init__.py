"""What a stage of training does to features, measured at a size that a laptop can train."""
