"""`python -m benthic` is `benthic`."""

from benthic.cli.main import run

run()
