"""What is looked at: affine geometry, samplers of views, and the warp that makes them."""

from .geometry import N_PARAMETERS, ViewBounds, affine, bounded
from .sampling import sample_views
from .warp import warp

__all__ = ["N_PARAMETERS", "ViewBounds", "affine", "bounded", "sample_views", "warp"]
