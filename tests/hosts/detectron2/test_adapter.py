import pytest
import torch

from contract import detectron2_case
from ssod.core.structures import RegionOutput
from ssod.errors import InputError
from ssod.hosts.detectron2.adapter import Detectron2RCNN


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "CascadeROIHeads"),
        ("MODEL.MASK_ON", True, "MODEL.MASK_ON"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou", "BBOX_REG_LOSS_TYPE giou"),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "USE_SIGMOID_CE"),
        ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "TRAIN_ON_PRED_BOXES"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "PROPOSAL_GENERATOR.NAME RPN"),
    ],
)
def test_head_that_is_not_supported_is_refused_with_those_that_are(key, value, found):
    cfg = detectron2_case.config()
    cfg.merge_from_list([key, value, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True])
    with pytest.raises(InputError, match=f"{found}.* is not supported; .*StandardROIHeads"):
        Detectron2RCNN(cfg)


def test_rows_of_detections_count_from_before_broken_regions_were_dropped():
    """Detectron2 drops rows that are not finite before it counts the kept ones."""
    detector = detectron2_case.build().eval()
    boxes = torch.tensor(
        [[0.0, 0, 5, 5], [1, 1, 4, 4], [2, 2, 7, 7], [20, 3, 30, 6], [20, 20, 30, 30]]
    )
    deltas = torch.zeros(5, detectron2_case.NUM_CLASSES, 4)
    deltas[1] = torch.nan
    class_probs = torch.full((5, 4), 0.02)
    for row, (label, score) in enumerate([(0, 0.9), (0, 0.8), (1, torch.nan), (2, 0.7), (1, 0.96)]):
        class_probs[row, label] = score
    class_probs[:, -1] = 1 - class_probs[:, :-1].sum(1)
    output = RegionOutput(torch.zeros(5, 4), deltas, torch.arange(5.0)[:, None])
    # The fourth region lies at the right of the image: its box is clipped to nothing.
    found = detector.detect(boxes, output, class_probs, (40, 18))
    assert found.embeddings.flatten().tolist() == [0]
    found = detector.detect(boxes, output, class_probs, (40, 40))
    assert found.embeddings.flatten().tolist() == [4, 0, 3]
    assert torch.equal(found.boxes, boxes[[4, 0, 3]])
    assert torch.equal(found.class_probs, class_probs[[4, 0, 3]])
    assert found.classes.tolist() == [1, 0, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.96, 0.9, 0.7]))


def test_bgr_models_get_bgr_and_rgb_models_rgb():
    image = torch.stack([torch.full((4, 4), v, dtype=torch.uint8) for v in (10, 20, 30)])
    detector = detectron2_case.build()
    detector.pixel_mean.zero_()
    detector.pixel_std.fill_(1)
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [30, 20, 10]
    detector.input_format = "RGB"
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [10, 20, 30]
