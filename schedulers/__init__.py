"""Where sampling starts and which noise level it is at: x0 prediction for every scheduler."""

from .x0_prediction import predict_x0

__all__ = ["predict_x0"]
