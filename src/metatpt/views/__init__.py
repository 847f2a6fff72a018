"""What is looked at: affine geometry, samplers of views, and the warp that makes them."""

from .geometry import N_PARAMETERS, ViewBounds, affine, bounded
from .sampling import clamp_start, sample_views
from .warp import warp

__all__ = ["N_PARAMETERS", "ViewBounds", "affine", "bounded", "clamp_start", "sample_views", "warp"]
