"""`python -m fastvideo`: the command line."""

import sys

from fastvideo.cli import main

sys.exit(main())
