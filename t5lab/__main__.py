"""python -m t5lab: the same as the `t5lab` script."""

import sys

from t5lab import cli

sys.exit(cli.main())
