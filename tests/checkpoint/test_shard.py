"""One file written tensor by tensor is what the safetensors library reads."""

import pytest
import torch
from safetensors.torch import load_file

from benthic.checkpoint.folder import Entry
from benthic.checkpoint.shard import ShardWriter

TENSORS = {
    "odd": ("F8_E4M3", torch.arange(15.0).view(3, 5).to(torch.float8_e4m3fn)),
    "wide": ("F32", torch.arange(3.0)),
    "half": ("BF16", torch.arange(7.0).bfloat16()),
    "number": ("F32", torch.tensor(4.0)),
    "nothing": ("BF16", torch.empty(0, 3, dtype=torch.bfloat16)),
}


def test_tensors_of_odd_sizes_come_back_in_any_order_of_writing(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = [Entry(name, dtype, tuple(tensor.shape), path.name) for name, (dtype, tensor) in TENSORS.items()]
    with ShardWriter(path, entries) as file:
        for name in reversed(TENSORS):
            file.write(name, TENSORS[name][1])
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, (_, tensor) in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
        assert found[name].data_ptr() % tensor.itemsize == 0


def test_transposed_tensors_are_written_in_order(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(6.0).view(2, 3).T
    with ShardWriter(path, [Entry("a", "F32", (3, 2), path.name)]) as file:
        file.write("a", tensor)
    assert torch.equal(load_file(path)["a"], tensor)


def test_a_tensor_that_was_announced_must_come(tmp_path):
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(AssertionError, match=r"never written: \['a'\]"),
        ShardWriter(path, [Entry("a", "F32", (1,), "")]),
    ):
        pass
