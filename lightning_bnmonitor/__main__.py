"""``python -m lightning_bnmonitor``: the same as the command ``bnmonitor``."""

import sys

from lightning_bnmonitor.commands import main

sys.exit(main())
