"""Floor 4: the ranks of a run, which part of the model each holds, and what they send each other."""
