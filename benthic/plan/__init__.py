"""Floor 1: arithmetic on a config, without torch. The trainer's MFU and the engine's cache size are these functions."""
