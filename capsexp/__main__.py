"""`python -m capsexp`."""

import sys

from capsexp.cli.main import main

sys.exit(main())
