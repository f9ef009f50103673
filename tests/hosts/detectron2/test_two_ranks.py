import pytest
import torch
from detectron2.engine import launch

import two_ranks

CASES = {"boxes": (3, 2), "a rank without a box": (3, 0)}


@pytest.fixture(scope="module")
def results(shapes, tmp_path_factory):
    """Folder of what one process and what two have learned."""
    output = tmp_path_factory.mktemp("ranks")
    for num_processes in (1, 2):
        args = (shapes, output, list(CASES.values()))
        launch(two_ranks.train_cases, num_processes, dist_url="auto", args=args)
    return output


@pytest.mark.parametrize("num_boxes", CASES.values(), ids=CASES)
def test_two_processes_equal_one_on_the_joined_batch(num_boxes, results):
    one, two = (torch.load(results / f"{count}_{num_boxes}.pth") for count in (1, 2))
    assert {name: len(values) for name, values in two["losses"].items()} == {
        name: 2 if "unsup" in name else 3 for name in one["losses"]
    }
    for name, values in one["losses"].items():
        assert two["losses"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    for name in ("loss_cls_unsup", "loss_cls_low_res_unsup", "loss_distill_unsup"):
        assert one["losses"][name][-1] > 0
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-5, atol=1e-5)


def test_a_sweep_of_two_processes_equals_that_of_one(results):
    one, two = (torch.load(results / f"{count}_sweep.pth") for count in (1, 2))
    assert one["uncertain_thresh"].min() < one["reliable_thresh"].max() < 1
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
