"""Kernels run on the GPU where there is one; plain Triton ones run in Triton's interpreter where there is none."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, Triton's own too, so before its import

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(
    not HOPPER, reason="a Gluon kernel for sm_90: Triton's interpreter does not know Gluon"
)


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch):
    """Lets the interpreter (3.6) loop up to an argument: numpy 2.4 no longer makes an int of an array of one."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton comes with CUDA builds of torch")
    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from torch's allocators holds NaN, so that an element nobody writes is seen."""
    plain, plain_like, plain_new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.element_size() > 1 else spoil(tensor)

    def spoil(tensor):
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new(*a, **k)))
