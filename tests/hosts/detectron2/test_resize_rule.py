import numpy as np
from detectron2.data.transforms import ResizeShortestEdge

from ssod.data.views import resize_shortest_edge


def test_size_rule_is_that_of_detectron2():
    rng = np.random.default_rng(0)
    for height, width, size in rng.integers(20, 900, (2000, 3)).tolist():
        expected = ResizeShortestEdge.get_output_shape(height, width, size, 1333)
        assert resize_shortest_edge(height, width, size, 1333) == expected
