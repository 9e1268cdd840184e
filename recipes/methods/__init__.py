"""The knobs of each method: MAE, LUT, DTM. Where each comes from stands beside it and in docs/methods.md."""

from recipes.methods.dtm import Dtm
from recipes.methods.lut import Lut
from recipes.methods.mae import Mae
from recipes.methods.mae_dtm import MaeDtm

Objective = Mae | Lut | Dtm | MaeDtm

__all__ = ["Dtm", "Lut", "Mae", "MaeDtm", "Objective"]
