"""Each operation in plain torch, and the whole network in `model.py`: the oracle of every test.

Nothing here is fast and nothing outside tests needs it to be. Each file is the twin of one in `benthic.ops`.
"""
