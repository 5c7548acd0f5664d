"""`python -m evaluation.benchmarks.aerial_scenes OUTPUT_DIR`."""

import sys

from .data_set import main


sys.exit(main())
