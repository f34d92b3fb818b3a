"""Running a model layer by layer: one decoder layer in memory at a time, hidden states beside it, resumable."""
