"""Messages between the server's process and the engine's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benthic.model.sampling import SamplingParams
from benthic.serve import messages
from benthic.serve.messages import LENGTH_BYTES, Add, Counts, Delta, Finish, Sampling, Step, length_of, packed
from benthic.serve.messages import read_order as order
from benthic.serve.messages import read_report as report

NOT_SERVED = {"routed_experts"}


def test_what_a_request_can_set_has_the_engine_s_names_and_defaults():
    fields = {field.name: field for field in msgspec.structs.fields(Sampling)}
    assert set(fields) == set(SamplingParams.model_fields) - NOT_SERVED
    assert SamplingParams(**msgspec.structs.asdict(Sampling(max_tokens=128))) == SamplingParams()


def test_messages_come_back_as_they_went():
    one = Add(3, [1, 2], Sampling(max_tokens=4, logit_bias={7: 1.5}, stop=("é",)), "salt")
    content = packed(one)
    assert length_of(content[:LENGTH_BYTES]) == len(content) - LENGTH_BYTES
    assert order(content[LENGTH_BYTES:]) == one
    step = Step([Delta(3, 0, [5], "x", [-0.5], [{5: -0.5}], None, Finish("stop"))], Counts(steps=2))
    assert report(packed(step)[LENGTH_BYTES:]) == step


def test_messages_of_the_wrong_type_or_length_are_refused():
    with pytest.raises(msgspec.ValidationError):
        order(packed(Step([], Counts()))[LENGTH_BYTES:])
    with pytest.raises(msgspec.DecodeError):
        order(b"\x80\x04\x95")
    with pytest.raises(ConnectionError, match="at most 268435456 are allowed"):
        length_of(b"\xff\xff\xff\xff")


def test_the_server_s_process_does_not_import_torch():
    code = "import benthic.serve.server, sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_server_pickles():
    for path in Path(messages.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text
        assert "multiprocessing" not in text
