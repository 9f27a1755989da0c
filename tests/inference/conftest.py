import pytest

from benthic.config.engine import EngineConfig
from benthic.inference.engine import Engine


@pytest.fixture
def make_engine():
    """Engines whose blocks are all accounted for when the test ends."""
    made = []

    def make(model, speculative=False, tokenizer=None, *, always_draft=True, **settings):
        settings["always_draft"] = always_draft  # tests do not depend on the clock
        made.append(Engine(model, speculative=speculative, tokenizer=tokenizer, settings=EngineConfig(**settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.check()
        if not engine.has_work:
            assert engine.pool.referenced == 0
