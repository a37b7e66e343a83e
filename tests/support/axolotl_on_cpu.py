"""A plugin of the tests: axolotl names an accelerator by number on several ranks, on machines without one too."""

from axolotl.integrations.base import BasePlugin


class OnCPU(BasePlugin):
    """Loads the model without a device map."""

    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = None
