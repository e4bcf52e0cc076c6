"""What each of two processes runs: half of every batch of `test_trainer`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.training.small import make_drafter
from tests.training.test_trainer import make_arguments, make_trainer

if __name__ == "__main__":
    make_trainer(make_drafter(), make_arguments(Path(sys.argv[1]), max_steps=4, batch_size=2)).train()
