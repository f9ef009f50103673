"""Two processes equal one on the joined batch, through `Run`: gradients, filters and methods."""

import pytest
import torch
from detectron2.engine import launch

import two_ranks

CASES = [(name, parts) for name in two_ranks.ALL for parts in (1, 2)]
CASES.remove((two_ranks.NO_BOX, 2))  # the parts of one process are other images


@pytest.fixture(scope="module")
def output(shapes, tmp_path_factory):
    """Folder of what one process and what two have learned."""
    output = tmp_path_factory.mktemp("ranks")
    keys = two_ranks.write_data(shapes, output / "data")
    for num_processes in (1, 2):
        args = (shapes, keys, output, CASES)
        launch(two_ranks.train_all, num_processes, dist_url="auto", args=args)
    return output


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_two_processes_equal_one_on_the_joined_batch(name, parts, output):
    (one, model), (two, other) = (two_ranks.read(output, name, parts, n) for n in (1, 2))
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert any(line.get("loss_cls_unsup", 0) > 0 for line in one)
    for expected, actual in zip(one, two, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    for key, value in model.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)
