"""`python -m capsexp`."""

import sys

from capsexp.cli import main

sys.exit(main())
