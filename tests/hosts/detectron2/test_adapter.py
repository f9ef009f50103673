import pytest
import torch
from detectron2.structures import Boxes, Instances

from contract import detectron2_case
from ssod.errors import InputError
from ssod.hosts.detectron2.adapter import Detectron2RCNN, _to_detections


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
    result = Instances((9, 9))
    result.pred_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [1, 1, 4, 4], [9, 3, 9, 6]]))
    result.scores = torch.tensor([0.9, 0.8, 0.7])
    result.pred_classes = torch.tensor([1, 0, 0])
    finite = torch.tensor([True, False, True, True])
    rows = torch.arange(4.0)[:, None]
    found = _to_detections(result, torch.tensor([2, 0, 1]), finite, rows, rows)
    assert found.embeddings.flatten().tolist() == [3, 0]  # the third box is empty
    assert found.class_probs.flatten().tolist() == [3, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_bgr_models_get_bgr_and_rgb_models_rgb():
    image = torch.stack([torch.full((4, 4), v, dtype=torch.uint8) for v in (10, 20, 30)])
    detector = detectron2_case.build()
    detector.pixel_mean.zero_()
    detector.pixel_std.fill_(1)
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [30, 20, 10]
    detector.input_format = "RGB"
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [10, 20, 30]
