"""Images without a pseudo-box, through every host's own run."""

import pytest
import torch

from contract.hosts import HOSTS, Host, read_losses
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, FixedThreshold
from tiny_run import BURN_IN_ITERS, MAX_ITER

KEYS = ("SSOD.DATA.VAL_JSON", "", "SSOD.LOG_PERIOD", 1, "SSOD.DATA.UNLABELED_PER_BATCH", 4)


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class FirstHalfOnly(FixedThreshold):
    """No boxes in the second half of the images."""

    def __init__(self):
        super().__init__(0.0)

    def forward(self, detections):
        return [
            label[: len(label) if 2 * row < len(detections) else 0]
            for row, label in enumerate(super().forward(detections))
        ]


@pytest.fixture(scope="module", params=HOSTS)
def host(request, shapes):
    return Host(request.param, shapes, *KEYS)


@pytest.fixture(scope="module")
def losses(host, tmp_path_factory):
    """Lines with unlabeled images, and the run, by what is done with empty ones."""
    found = {}
    for mode in ("background", "left_out", "share"):
        output = tmp_path_factory.mktemp(mode) / "run"
        run = host.train(output, "SSOD.FILTER.NAME", "FirstHalfOnly", "SSOD.EMPTY_IMAGES", mode)
        found[mode] = read_losses(output), run
    return found


def test_training_goes_on_in_every_way(losses):
    for lines, run in losses.values():
        assert len(lines) == MAX_ITER - BURN_IN_ITERS
        assert all(line["pseudo/empty_images"] == 0.5 for line in lines)
        assert all(0 < line["loss_cls_unsup"] < float("inf") for line in lines)
        assert all(p.isfinite().all() for p in run.model.student.parameters())


def test_the_share_is_a_factor_and_what_is_left_out_no_longer_counts(losses):
    first = {mode: lines[0] for mode, (lines, _) in losses.items()}
    names = [name for name in first["share"] if name.startswith("loss_") and "unsup" in name]
    assert len(names) == 4
    for name in names:
        assert first["share"][name] == pytest.approx(0.5 * first["background"][name])
    # A mean over all sampled regions, of which half were in the empty images.
    assert first["left_out"]["loss_box_reg_unsup"] > first["background"]["loss_box_reg_unsup"]


@pytest.mark.parametrize("mode", ["left_out", "share"])
def test_without_a_box_only_labels_are_learned(host, mode, tmp_path):
    none = ("SSOD.FILTER.SCORE_THRESH", 1.0, "SOLVER.WEIGHT_DECAY", 0, "SSOD.EMPTY_IMAGES", mode)
    host.train(tmp_path / "run", *none)
    lines = read_losses(tmp_path / "run")
    unsup = [v for line in lines for k, v in line.items() if k.startswith("loss_") and "uns" in k]
    assert len(unsup) == 4 * len(lines) and not any(unsup)
    assert torch.tensor([line["loss_cls"] for line in lines]).all()
