"""`python -m t2ct` is the command `t2ct`."""

import sys

from t2ct.cli import main

sys.exit(main())
