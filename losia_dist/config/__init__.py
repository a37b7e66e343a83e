"""What users set: `LoSiAConfig`, and what it is read from."""

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.config.selection import Drawn, Located

__all__ = ["Drawn", "LoSiAConfig", "Located"]
