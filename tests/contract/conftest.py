"""The hosts that are installed, and a detector of each."""

from importlib import import_module

import pytest
import torch

from contract.hosts import HOSTS


@pytest.fixture(params=HOSTS)
def case(request):
    case = import_module(f"contract.{request.param}_case")
    with case.storage():
        yield case


@pytest.fixture
def detector(case):
    torch.manual_seed(0)
    detector = case.build()
    # Initial heads are almost constant; larger weights make mistakes visible.
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector.train()
